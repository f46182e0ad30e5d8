-- Nobody makes up ids: one would hold up the sealing of all below it for good.
ALTER TABLE events_log ALTER COLUMN id SET GENERATED ALWAYS;

CREATE TABLE quarantine (
    id              BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    refused_at      TIMESTAMPTZ NOT NULL,
    kind            TEXT NOT NULL,
    reason          TEXT NOT NULL,
    site_id         TEXT,
    content         BYTEA,
    event_id        UUID UNIQUE,
    acknowledged    BOOLEAN NOT NULL DEFAULT false
);
CREATE INDEX quarantine_kind ON quarantine (kind, id) WHERE NOT acknowledged;

CREATE TABLE refusal_counts (
    hour            TIMESTAMPTZ NOT NULL,
    kind            TEXT NOT NULL,
    site_id         TEXT NOT NULL,
    number          BIGINT NOT NULL,
    PRIMARY KEY (hour, kind, site_id)
);

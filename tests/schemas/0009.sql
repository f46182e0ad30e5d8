-- The current truth of the database. A change here comes with a file in appliance/store/migrations/ that leads to it
-- from the version before (appliance/store/migrations.py).

-- One row: who this is. The id is written into every manifest, so that a bucket can tell two installations apart.
CREATE TABLE installation (
    id              UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    schema_version  INTEGER NOT NULL,
    created_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    -- The bucket from which events are being brought back: until that is done nothing is sealed.
    restoring       TEXT
);

-- Every event, raw. Ids come from one sequence (CACHE 1) and are drawn only by statements that already hold a lock on
-- this table: sealing depends on that (appliance/store/sealing.py), and an id that somebody makes up would hold it up
-- for good, which is why they are GENERATED ALWAYS. Half of each page stays free so that setting
-- exported_at is a HOT update: no index may ever name that column.
CREATE TABLE events_log (
    id              BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id        UUID NOT NULL UNIQUE,
    event_type      VARCHAR(50) NOT NULL,
    session_id      VARCHAR(100),
    visitor_id      VARCHAR(100),
    site_id         VARCHAR(100),
    timestamp       TIMESTAMPTZ NOT NULL,
    url             TEXT,
    path            VARCHAR(500),
    user_agent      TEXT,
    ip_address      INET,
    raw_event_data  JSONB NOT NULL,
    created_at      TIMESTAMPTZ DEFAULT NOW(),
    exported_at     TIMESTAMPTZ
) WITH (fillfactor = 50);

-- How many events came in: one row per statement, minute and site, written with the events and merged later
-- (appliance/store/counters.py). The status page reads this and never counts events_log.
CREATE TABLE event_counts (
    minute          TIMESTAMPTZ NOT NULL,
    site_id         TEXT NOT NULL,
    events          BIGINT NOT NULL,
    last_id         BIGINT NOT NULL
);
CREATE INDEX event_counts_minute ON event_counts (minute);

-- By a trigger and not by the appliance: a group of events is then one COPY and nothing else, one way to the server and
-- back.
CREATE FUNCTION count_new_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO event_counts (minute, site_id, events, last_id)
    SELECT date_trunc('minute', coalesce(created_at, now())), site_id, count(*), max(id) FROM new_events
    WHERE site_id IS NOT NULL GROUP BY 1, 2;
    RETURN NULL;
END $$;
CREATE TRIGGER count_new_events AFTER INSERT ON events_log REFERENCING NEW TABLE AS new_events
    FOR EACH STATEMENT EXECUTE FUNCTION count_new_events();

-- What was refused, and why, for the owner to look at. Of each kind the newest are kept; but what was answered 2xx and
-- then refused by events_log stays (its event_id keeps it from standing here twice).
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

-- How often things were refused. The site is empty where none was known.
CREATE TABLE refusal_counts (
    hour            TIMESTAMPTZ NOT NULL,
    kind            TEXT NOT NULL,
    site_id         TEXT NOT NULL,
    number          BIGINT NOT NULL,
    PRIMARY KEY (hour, kind, site_id)
);

-- The export ledger: what was exported is what stands here.

-- What a job covers. Rows of the site with an id up to sealed_to are sealed into batches of the job, or were outside
-- of what it covered when that ground was sealed. '*' stands for every site that has no row of its own in this job.
CREATE TABLE export_coverage (
    job             TEXT NOT NULL,
    site            TEXT NOT NULL,
    sealed_to       BIGINT NOT NULL DEFAULT 0,
    active          BOOLEAN NOT NULL DEFAULT true,
    PRIMARY KEY (job, site)
);

-- A sealed batch is frozen whole: its keys and bytes depend on these columns and its ranges alone.
CREATE TABLE export_batches (
    job             TEXT NOT NULL,
    sequence        BIGINT NOT NULL CHECK (sequence > 0),
    kind            TEXT NOT NULL DEFAULT 'batch',
    sealed_at       TIMESTAMPTZ NOT NULL DEFAULT now(),
    row_count       BIGINT NOT NULL CHECK (row_count > 0),
    format          TEXT NOT NULL,
    compression     TEXT NOT NULL,
    object_rows     BIGINT NOT NULL,
    object_bytes    BIGINT NOT NULL,
    schema_version  INTEGER NOT NULL,
    state           TEXT NOT NULL DEFAULT 'sealed' CHECK (state IN ('sealed', 'settled')),
    settled_at      TIMESTAMPTZ,
    manifest        TEXT,
    manifest_sha256 TEXT,
    escape_formulas BOOLEAN NOT NULL DEFAULT false,
    PRIMARY KEY (job, sequence)
);
CREATE INDEX export_batches_sealed ON export_batches (job, sequence) WHERE state = 'sealed';

-- The rows of a batch: of each site those with from_id < id <= to_id. '*': of every site but except_sites.
CREATE TABLE export_ranges (
    job             TEXT NOT NULL,
    sequence        BIGINT NOT NULL,
    site            TEXT NOT NULL,
    except_sites    TEXT[] NOT NULL DEFAULT '{}',
    from_id         BIGINT NOT NULL,
    to_id           BIGINT NOT NULL,
    PRIMARY KEY (job, sequence, site),
    FOREIGN KEY (job, sequence) REFERENCES export_batches
);

-- The objects of a batch as they were first written. Keys are relative to the prefix of each bucket.
CREATE TABLE export_objects (
    job             TEXT NOT NULL,
    sequence        BIGINT NOT NULL,
    part            INTEGER NOT NULL,
    key             TEXT NOT NULL,
    row_count       BIGINT NOT NULL,
    bytes           BIGINT NOT NULL,
    sha256          TEXT NOT NULL,
    first_event     TIMESTAMPTZ,
    last_event      TIMESTAMPTZ,
    PRIMARY KEY (job, sequence, part),
    FOREIGN KEY (job, sequence) REFERENCES export_batches
);

-- Client and backup bucket succeed and fail each for itself.
CREATE TABLE export_deliveries (
    job             TEXT NOT NULL,
    sequence        BIGINT NOT NULL,
    bucket          TEXT NOT NULL,
    prefix          TEXT NOT NULL,
    state           TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered')),
    attempts        INTEGER NOT NULL DEFAULT 0,
    attempted_at    TIMESTAMPTZ,
    delivered_at    TIMESTAMPTZ,
    last_error      TEXT,
    -- Since it last went well; and until when it is left alone.
    failures        INTEGER NOT NULL DEFAULT 0,
    retry_at        TIMESTAMPTZ,
    -- All there ever were.
    errors          INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (job, sequence, bucket),
    FOREIGN KEY (job, sequence) REFERENCES export_batches
);
CREATE INDEX export_deliveries_pending ON export_deliveries (job, sequence) WHERE state = 'pending';

-- How far exported_at has been set and rows have been deleted, by site ('*': every site that no job names).
CREATE TABLE export_marks (
    site            TEXT PRIMARY KEY,
    marked_to       BIGINT NOT NULL DEFAULT 0,
    deleted_to      BIGINT NOT NULL DEFAULT 0
);

-- Saves two processes from doing one job's work twice. Nothing depends on it being held.
CREATE TABLE export_leases (
    job             TEXT PRIMARY KEY,
    holder          UUID NOT NULL,
    expires_at      TIMESTAMPTZ NOT NULL
);

-- What the last runs did, for people.
CREATE TABLE export_runs (
    id              BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job             TEXT NOT NULL,
    started_at      TIMESTAMPTZ NOT NULL DEFAULT now(),
    finished_at     TIMESTAMPTZ,
    outcome         TEXT NOT NULL DEFAULT 'running' CHECK (outcome IN ('running', 'done', 'failed')),
    batches         BIGINT NOT NULL DEFAULT 0,
    row_count       BIGINT NOT NULL DEFAULT 0,
    message         TEXT NOT NULL DEFAULT '',
    -- Set when the run has come to its end: what was due up to here need not be run again.
    due             TIMESTAMPTZ
);
CREATE INDEX export_runs_job ON export_runs (job, id);

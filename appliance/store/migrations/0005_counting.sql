-- Events are counted by the database: a group of events is then one COPY and nothing else.
CREATE FUNCTION count_new_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO event_counts (minute, site_id, events, last_id)
    SELECT date_trunc('minute', coalesce(created_at, now())), site_id, count(*), max(id) FROM new_events
    WHERE site_id IS NOT NULL GROUP BY 1, 2;
    RETURN NULL;
END $$;
CREATE TRIGGER count_new_events AFTER INSERT ON events_log REFERENCING NEW TABLE AS new_events
    FOR EACH STATEMENT EXECUTE FUNCTION count_new_events();

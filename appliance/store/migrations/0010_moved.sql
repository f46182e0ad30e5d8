-- A database whose events have gone to another one must not go on by mistake: buckets know one history alone.
ALTER TABLE installation ADD COLUMN moved_at TIMESTAMPTZ;

-- While events are brought back from a bucket nothing is sealed.
ALTER TABLE installation ADD COLUMN restoring TEXT;

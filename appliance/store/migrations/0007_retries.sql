-- A bucket that failed is left alone for a while, each time for longer.
ALTER TABLE export_deliveries ADD COLUMN failures INTEGER NOT NULL DEFAULT 0, ADD COLUMN retry_at TIMESTAMPTZ;

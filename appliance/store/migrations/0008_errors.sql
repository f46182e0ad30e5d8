-- Errors are counted for good: metrics must not fall when a delivery goes well at last.
ALTER TABLE export_deliveries ADD COLUMN errors INTEGER NOT NULL DEFAULT 0;
UPDATE export_deliveries SET errors = failures WHERE failures > 0;

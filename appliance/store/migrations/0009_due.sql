-- Of several appliances on one database each has every job's line: one of them runs it each time it comes due.
ALTER TABLE export_runs ADD COLUMN due TIMESTAMPTZ;

-- CSV may be written so that spreadsheets take no cell for a formula; like all else of a batch this is frozen.
ALTER TABLE export_batches ADD COLUMN escape_formulas BOOLEAN NOT NULL DEFAULT false;

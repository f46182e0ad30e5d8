-- Retention goes on where it last ended.
ALTER TABLE export_marks ADD COLUMN deleted_to BIGINT NOT NULL DEFAULT 0;

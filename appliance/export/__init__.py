"""The way out: sealed batches become objects in the client's bucket and in the backup bucket."""

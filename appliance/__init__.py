"""A box that keeps every web event raw and hands complete copies to the client's own buckets."""

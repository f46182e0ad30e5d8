"""The windows: health checks, the status page, and the demo site."""

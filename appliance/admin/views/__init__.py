"""One file a page; each registers its routes."""

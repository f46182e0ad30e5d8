"""The way in: requests become rows, and an answer of 2xx means that they are on disk."""

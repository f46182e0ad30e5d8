"""What stops a measure; the message says what can be done about it."""


class BenchError(Exception):
    """A measure cannot be taken, or its runs are worth nothing."""

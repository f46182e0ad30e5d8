"""Small words of sentences for people."""


def counted(number: int, one: str, many: str) -> str:
    """Return "1 batch" or "2 batches"."""
    return f"{number} {one if number == 1 else many}"

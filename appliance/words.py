"""Small words of sentences for people."""

import signal


def counted(number: int, one: str, many: str) -> str:
    """Return "1 batch" or "2 batches"."""
    return f"{number} {one if number == 1 else many}"


def how_ended(exit_code: int) -> str:
    """Return "exit code 1" or, of a process that a signal has ended (a negative code), its name: "SIGKILL"."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        # Those for real time have numbers alone.
        return f"signal {-exit_code}"

"""`python -m appliance` is the `appliance` command."""

import os
import signal
import sys


def main() -> None:
    """Be ready to be stopped, then load the rest and run the command."""
    # From process 1 of a container the kernel keeps every signal that it does not handle: a stop that comes while the
    # rest is loading would be lost, and ten seconds later the container killed.
    first = os.getpid() == 1
    if first:
        # At once, there is nothing to put away yet: an exception is lost where it meets one of the import system's
        # own callbacks.
        signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
    from appliance.cli import main as command  # noqa: PLC0415 - half a second; see above

    if first:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    command()


if __name__ == "__main__":
    main()

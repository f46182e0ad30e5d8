"""`python -m appliance` is the `appliance` command."""

import os
import signal
import sys


def main() -> None:
    """Be ready to be stopped, then load the rest and run the command."""
    if os.getpid() == 1:
        # From process 1 of a container the kernel keeps every signal that it does not handle: a stop that comes while
        # the rest is loading would be lost, and ten seconds later the container killed.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    from appliance.cli import main as command  # noqa: PLC0415 - half a second; see above

    command()


if __name__ == "__main__":
    main()

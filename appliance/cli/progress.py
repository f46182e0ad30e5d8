"""How far long work has come: a bar on a terminal, a line now and then in a log. Both on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

# Told how much is done, how much there is, and what comes next.
Progress = Callable[[int, int, object], None]

_LINE_EVERY_SECONDS = 5.0


@contextmanager
def progress() -> Iterator[Progress]:
    """Lend what is to be told of each step."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console  # noqa: PLC0415 - only for people at a terminal
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    text = TextColumn("{task.description}", markup=False)
    with Bar(
        text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of, what: bar.update(task, completed=done, total=of, description=str(what)[-60:])


class _Lines:
    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, done: int, of: int, what: object) -> None:
        if time.monotonic() >= self._next:
            click.echo(f"{done + 1} of {of}: {what}", err=True)
            self._next = time.monotonic() + _LINE_EVERY_SECONDS

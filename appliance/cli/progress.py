"""How far long work has come: a bar on a terminal, a line now and then in a log. Both on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

# Told how much is done, how much there is, and what comes next.
Progress = Callable[[int, int, object], None]

# Told how many bytes have gone, where nobody knows of how many.
Growth = Callable[[int], None]

_LINE_EVERY_SECONDS = 5.0
_SHOW_EVERY_SECONDS = 0.2
_MB = 1_000_000


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


@contextmanager
def growth(done: str) -> Iterator[Growth]:
    """Lend what is to be told how many bytes are done (written, read, copied); short work shows nothing in a log."""
    if not sys.stderr.isatty():
        yield _Bytes(done, lambda text: click.echo(text, err=True), every=_LINE_EVERY_SECONDS)
        return
    from rich.console import Console  # noqa: PLC0415 - only for people at a terminal

    with Console(stderr=True).status("") as status:
        yield _Bytes(done, status.update, every=_SHOW_EVERY_SECONDS)


class _Bytes:
    def __init__(self, done: str, say: Callable[[str], None], *, every: float) -> None:
        self._done, self._say, self._every = done, say, every
        self._next = time.monotonic() + every

    def __call__(self, number: int) -> None:
        if time.monotonic() >= self._next:
            self._say(f"{number / _MB:,.0f} MB {self._done}")
            self._next = time.monotonic() + self._every


class _Lines:
    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, done: int, of: int, what: object) -> None:
        if time.monotonic() >= self._next:
            click.echo(f"{done + 1} of {of}: {what}", err=True)
            self._next = time.monotonic() + _LINE_EVERY_SECONDS

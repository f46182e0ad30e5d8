"""Sending a message to each URL, by a process of its own (sender.py).

apprise loads a hundred services and speaks to strangers' servers. In a process that is killed when its time is over it
holds up nobody, takes no memory from the collector, and cannot print a secret.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from appliance.alerts.conditions import Alert

# -P: nothing that lies in the working directory can pass for the appliance.
_COMMAND = (sys.executable, "-P", "-m", "appliance.alerts.sender")
SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """How it went with one URL, which is named by its number and its service: all else in it may be secret."""

    number: int
    service: str
    problem: str

    @property
    def line(self) -> str:
        """One line for people."""
        return f"alerts.urls {self.number} ({self.service}): {self.problem or 'the message was sent'}"


def send(urls: Sequence[str], alert: Alert, *, seconds: float = SECONDS) -> list[Sent]:
    """Send a message to every URL, all at once, and return how it went in their order."""
    content = json.dumps({"urls": list(urls), "title": alert.title, "text": alert.text, "seconds": seconds})
    with subprocess.Popen(  # noqa: S603 - our own
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # It steps back as a whole (priority.py).
        start_new_session=True,
    ) as child:
        try:
            answer, _ = child.communicate(content, timeout=seconds)
            late = f"the process that sends ended with exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            answer, _ = child.communicate()
            late = f"it did not answer within {seconds:.0f} s"
    problems = dict(_answers(answer))
    return [
        Sent(number=number, service=url.partition("://")[0].lower(), problem=problems.get(number, late))
        for number, url in enumerate(urls, 1)
    ]


def _answers(text: str) -> Iterator[tuple[int, str]]:
    """Read what the child said, of which the last line may be cut off."""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            number, problem = json.loads(line)
            yield int(number), str(problem)

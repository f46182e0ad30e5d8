"""Client processes that post events (load.py), and what they have noted."""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

CLIENTS = 3
THREADS = 4


@dataclass
class Crowd:
    """Client processes and what they have noted."""

    directory: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, url: str, *, per_second: float = 0) -> None:
        """Start them; together they send about so many events a second, or as many as they can."""
        command = [sys.executable, str(Path(__file__).parent / "load.py"), url]
        pace = str(per_second / CLIENTS / THREADS)
        for number in range(CLIENTS):
            notes = str(self.directory / f"notes{number}")
            process = subprocess.Popen([*command, notes, str(THREADS), pace], stdin=subprocess.PIPE, text=True)
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            assert process.wait(90) == 0
        self.processes.clear()

    def answers(self) -> list[tuple[str, list[str]]]:
        """Return status and acknowledged ids of every request."""
        lines = [line.split() for path in self.directory.glob("notes*") for line in path.read_text().splitlines()]
        return [(words[0], words[1:]) for words in lines if words]

    def acknowledged(self) -> set[str]:
        return {one for _, ids in self.answers() for one in ids}

    def statuses(self) -> Counter[str]:
        return Counter(status for status, _ in self.answers())

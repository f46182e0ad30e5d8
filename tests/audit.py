"""Asks whether a locked version has a known vulnerability. Exit code 1 when one has.

    python tests/audit.py LOCK...

pip-audit asks PyPI's advisory database. Where that cannot be reached, or a mirror that has no advisories stands in its
place, this says so and ends with 0: whoever builds without the network must not be kept from it by what is not
wrong with the project, and the next run that has the network finds the same.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_UNREACHABLE = re.compile(r"ConnectionError|ConnectTimeout|ReadTimeout|ServiceError|ProxyError|SSLError|NameResolution")
# By hashes and without pip: nothing is downloaded, resolved or run. Of the project itself nobody else knows.
_COMMAND = (sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--progress-spinner", "off")


@dataclass(frozen=True)
class Verdict:
    """What to tell, and whether it is the project's fault."""

    lines: tuple[str, ...]
    failed: bool = False


def main() -> None:
    verdicts = [audit(Path(name)) for name in sys.argv[1:]]
    for verdict in verdicts:
        sys.stdout.writelines(f"{line}\n" for line in verdict.lines)
    sys.exit(any(verdict.failed for verdict in verdicts))


def audit(lock: Path) -> Verdict:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [*_COMMAND, "--format", "json", "--output", str(report), "--requirement", str(lock)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return verdict_of(lock.name, done.stderr, report.read_text() if report.exists() else "")


def verdict_of(lock: str, said: str, report: str) -> Verdict:
    """Judge by what pip-audit wrote: its exit code is 1 for a vulnerability and for a broken network alike."""
    if report:
        return _judge(lock, json.loads(report)["dependencies"])
    why = (said.strip().splitlines() or ["it said nothing"])[-1]
    if _UNREACHABLE.search(said):
        return Verdict((f"{lock}: NOT AUDITED: the advisory database cannot be reached: {why}",))
    return Verdict((f"{lock}: pip-audit failed: {why}",), failed=True)


def _judge(lock: str, packages: list[dict[str, object]]) -> Verdict:
    found = [line for package in packages for line in _vulnerabilities(lock, package)]
    # pip-audit calls it good when the index knows none of them, as a mirror without advisories does.
    skipped = [str(package["name"]) for package in packages if "skip_reason" in package]
    if skipped:
        found.append(
            f"{lock}: NOT AUDITED: {len(skipped)} of {len(packages)} ({', '.join(skipped[:3])} ...): the index"
        )
        found[-1] += " that was asked has no advisories for them"
    good = f"{lock}: none of {len(packages)} packages has a known vulnerability"
    return Verdict(tuple(found) or (good,), failed=any("vulnerable" in line for line in found))


def _vulnerabilities(lock: str, package: dict[str, object]) -> list[str]:
    vulnerabilities = package.get("vulns", [])
    assert isinstance(vulnerabilities, list)
    return [
        f"{lock}: {package['name']} {package['version']} is vulnerable: {one['id']}, mended in "
        f"{', '.join(one['fix_versions']) or 'no version yet'}; renew the locks with `make lock`"
        for one in vulnerabilities
    ]


if __name__ == "__main__":
    main()

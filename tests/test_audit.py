"""`make audit`: a known vulnerability fails; a database that cannot be asked is told and fails nothing."""

import json
from typing import Any

from audit import verdict_of

GOOD = {"name": "flask", "version": "3.1.3", "vulns": []}
BAD = {"name": "jinja2", "version": "2.10", "vulns": [{"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"]}]}
UNKNOWN = {"name": "rich", "skip_reason": "Dependency not found on PyPI and could not be audited: rich (14.0)"}
OFFLINE = """Traceback (most recent call last):
    raise ConnectionError(e, request=request)
requests.exceptions.ConnectionError: HTTPSConnectionPool(host='pypi.org', port=443): Max retries exceeded
"""


def report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_known_vulnerability_fails_and_is_named_with_what_to_do() -> None:
    verdict = verdict_of("a.lock", "", report(GOOD, BAD))
    assert verdict.failed
    (line,) = verdict.lines
    assert line.startswith("a.lock: jinja2 2.10 is vulnerable: PYSEC-2019-217, mended in 2.10.1; renew")


def test_without_any_all_is_said_to_be_well() -> None:
    verdict = verdict_of("a.lock", "", report(GOOD))
    assert (verdict.failed, verdict.lines) == (False, ("a.lock: none of 1 packages has a known vulnerability",))


def test_without_the_network_it_says_that_nothing_was_audited_and_fails_nothing() -> None:
    verdict = verdict_of("a.lock", OFFLINE, "")
    assert not verdict.failed
    assert "NOT AUDITED: the advisory database cannot be reached" in verdict.lines[0]


def test_a_mirror_without_advisories_is_not_taken_for_good_news() -> None:
    verdict = verdict_of("a.lock", "", report(GOOD, UNKNOWN))
    assert not verdict.failed
    assert "NOT AUDITED: 1 of 2 (rich" in verdict.lines[0]


def test_what_was_not_audited_hides_no_vulnerability() -> None:
    verdict = verdict_of("a.lock", "", report(UNKNOWN, BAD))
    assert verdict.failed
    assert len(verdict.lines) == 2


def test_any_other_failure_of_the_audit_is_one() -> None:
    assert verdict_of("a.lock", "ERROR:pip_audit._cli:requirements file is missing hashes", "").failed
    assert verdict_of("a.lock", "", "").failed

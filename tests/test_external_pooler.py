"""PgBouncer in transaction mode in between: each transaction may meet another of the server's processes."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import Appliance
from servers import CONNECTIONS, Pooler, exporting_to, ids_in, new_ids, post

from appliance.store.database import Database, fetch_value, is_postgres_of_this_machine

pytestmark = pytest.mark.servers

ROUNDS = 12


def test_through_a_pooler_round_after_round_is_collected_sealed_and_exported(
    appliance: Callable[..., Appliance], pooler: Pooler, tmp_path: Path
) -> None:
    """Often enough that what is prepared on the fifth time would be, and is missed by the next process."""
    database, sent, bucket = pooler.new_database(), list[str](), tmp_path / "bucket"
    box = appliance(**exporting_to(bucket, pooler.url(database))).start()
    for _ in range(ROUNDS):
        ids = new_ids(3)
        assert post(box, ids)[1]["accepted"] == 3
        # By way of a temporary table.
        assert post(box, ids[:2])[1]["duplicates"] == 2
        sent += ids
    for _ in range(2):
        ids = new_ids(2)
        post(box, ids)
        sent += ids
        (report,) = json.loads(box.run("export", "--json").stdout)
        assert not report["failed"]
    assert ids_in(bucket) == Counter(sent)
    assert box.run("verify").stdout.endswith("0 found wrong\n")
    assert json.loads(box.run("status", "--json").stdout)["events"] == len(sent)
    assert "ERROR" not in box.log
    assert box.stop() == 0


def test_transactions_of_one_connection_do_meet_different_processes(pooler: Pooler) -> None:
    """What the other tests rest on; and a statement that is repeated is not prepared on one of them."""
    with Database(pooler.url(pooler.new_database())) as db:
        seen = set()
        for _ in range(ROUNDS):
            with db.connection() as conn:
                seen.add(fetch_value(conn, "SELECT pg_backend_pid() + %s", (0,)))
    assert len(seen) == CONNECTIONS


def test_processes_that_a_pooler_shares_out_are_not_made_to_step_back(pooler: Pooler) -> None:
    """One that has exported would be slow for the next one who stores events, for good."""
    database = pooler.new_database()
    assert is_postgres_of_this_machine(pooler.server.socket)
    assert not is_postgres_of_this_machine(pooler.socket(database))
    with Database(pooler.socket(database), makes_way=True) as db, db.connection() as conn:
        pid = fetch_value(conn, "SELECT pg_backend_pid()")
        assert (os.sched_getscheduler(pid), psutil.Process(pid).nice()) == (os.SCHED_OTHER, 0)

"""Running export jobs: who may run one (the lease), and what the ledger keeps of each run."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from uuid import UUID, uuid4

from appliance.config import Settings
from appliance.errors import DatabaseUnavailableError
from appliance.export.means import Means, StoppedError
from appliance.export.report import Report, Tally
from appliance.export.run import Run
from appliance.store import ledger, migrations, resting, runs, sealing
from appliance.store.database import Database

log = logging.getLogger(__name__)


class Exporter:
    """Runs export jobs. One for a process; its methods may be called from several threads."""

    def __init__(
        self, settings: Settings, db: Database, *, conninfo: str, stopping: threading.Event | None = None
    ) -> None:
        self.means = Means.of(settings, db, conninfo=conninfo, stopping=stopping)

    def jobs(self) -> list[str]:
        """Return the configured jobs, and those no longer configured that still owe a delivery."""
        with self.means.db.connection() as conn:
            owing = ledger.jobs_with_unsettled(conn)
        return [*self.means.settings.exports, *(job for job in owing if job not in self.means.settings.exports)]

    def sync_coverage(self, *, retire: bool = True) -> None:
        """Write into the ledger what the configuration covers: rows are not marked before all their jobs have them.

        Only `serve` ends what is no longer configured: a command that was given another file by mistake would end the
        jobs of the appliance that runs, and rows would be marked that they have not delivered.
        """
        jobs = {name: export.sites for name, export in self.means.settings.exports.items()}
        with self.means.db.connection() as conn:
            sealing.sync_coverage(conn, jobs, retire=retire)

    def run(
        self, job: str, *, wait_for_lease: bool = False, spare_resting: bool = False, due: datetime | None = None
    ) -> Report:
        """Deliver everything there is to deliver. A bucket that fails is in the report, the other one goes on.

        Raises BucketAheadError, DatabaseUnavailableError, SchemaError, BatchChangedError, StoppedError, and BucketError
        where only a bucket that does not answer knows what a batch was made of. With `wait_for_lease` a run that
        another process has under way, or has left behind, is waited for; with `spare_resting` buckets are left alone
        for a while after they have failed. Of several appliances whose clocks say that the job is `due`, one runs it.
        """
        with self.means.db.connection() as conn:
            # This program may be older than another appliance's, or newer than the worker that has started it.
            migrations.check_version(conn)
        holder = uuid4()
        with self._lease(job, holder, wait=wait_for_lease) as held:
            if not held:
                return Report(job=job, skipped=True)
            with self.means.db.connection() as conn:
                # Under the lease: the one that had it before has said what it has done before it let go.
                if due is not None and runs.is_done(conn, job, due):
                    return Report(job=job, done_elsewhere=True)
                run_id = runs.start(conn, job)
                rests = resting.until(conn, job) if spare_resting else {}
            tally = Tally(job, broken=set(rests), resting=rests)
            try:
                self.sync_coverage(retire=False)
                report = Run(self.means, job, tally).work()
            except Exception as error:
                self._record_crash(run_id, tally, error, due)
                raise
            self._record(run_id, report, failed=report.failed, message=report.summary, due=due)
            return report

    def _record(self, run_id: int, report: Report, *, failed: bool, message: str, due: datetime | None) -> None:
        with self.means.db.connection() as conn:
            runs.finish(
                conn,
                run_id,
                failed=failed,
                batches=report.batches,
                row_count=report.row_count,
                message=message,
                due=due,
            )

    def _record_crash(self, run_id: int, tally: Tally, error: Exception, due: datetime | None) -> None:
        # What was cut off, another appliance may go on with at once.
        stopped = isinstance(error, StoppedError)
        unfinished = stopped or isinstance(error, DatabaseUnavailableError)
        # The error itself goes on to the caller; a database that is away cannot also note it.
        with suppress(DatabaseUnavailableError):
            self._record(
                run_id, tally.report(), failed=not stopped, message=str(error), due=None if unfinished else due
            )

    @contextmanager
    def _lease(self, job: str, holder: UUID, *, wait: bool) -> Iterator[bool]:
        held = self._take_lease(job, holder)
        if not held and wait:
            log.info("export %s: another run is under way, or was cut off in the last seconds; waiting for it", job)
        while not held and wait:
            time.sleep(0.5)
            held = self._take_lease(job, holder)
        ended = threading.Event()
        renewing = threading.Thread(target=self._renew_lease, args=(job, holder, ended), daemon=True)
        if held:
            renewing.start()
        try:
            yield held
        finally:
            ended.set()
            if held:
                # It may be taking the lease anew just now, and would hold it for nobody.
                renewing.join()
            with suppress(DatabaseUnavailableError), self.means.db.connection() as conn:
                runs.release_lease(conn, job, holder)

    def _renew_lease(self, job: str, holder: UUID, ended: threading.Event) -> None:
        """Keep the lease while the run lasts: one large object may take longer than a lease does."""
        while not ended.wait(runs.RENEW_LEASE_SECONDS):
            with suppress(DatabaseUnavailableError):
                self._take_lease(job, holder)

    def _take_lease(self, job: str, holder: UUID) -> bool:
        with self.means.db.connection() as conn:
            return runs.take_lease(conn, job, holder)

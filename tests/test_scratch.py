"""Where objects are written: what a killed run leaves there goes with the next, what is in use stays."""

import signal
import subprocess
import sys
from pathlib import Path

from conftest import make_settings

from appliance.export.means import Means
from appliance.store.database import Database

HOLDER = """
import sys, time
from appliance.config import Settings
from appliance.export.means import Means
from appliance.store.database import Database

settings = Settings(server={"data_dir": sys.argv[1]})
with Means.of(settings, Database(""), conninfo="").scratch("acme") as directory:
    (directory / "object").write_text("half")
    print(directory, flush=True)
    time.sleep(60)
"""


def means_of(directory: Path) -> Means:
    return Means.of(make_settings(server={"data_dir": str(directory)}), Database(""), conninfo="")


def test_what_a_killed_run_left_goes_with_the_next_run_and_what_one_that_lives_writes_stays(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().strip())
        for _ in range(2):
            with means_of(tmp_path).scratch("acme") as own:
                assert own.exists()
                assert (held / "object").read_text() == "half"
        holder.send_signal(signal.SIGKILL)
    with means_of(tmp_path).scratch("another") as own:
        assert list((tmp_path / "tmp").iterdir()) == [own]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_run_spares_those_beside_it_in_its_own_process(tmp_path: Path) -> None:
    with means_of(tmp_path).scratch("acme") as first, means_of(tmp_path).scratch("acme") as second:
        assert first.exists()
        assert second.exists()

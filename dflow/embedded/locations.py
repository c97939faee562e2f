"""Where the embedded servers of one home keep their data and sockets, and so how everybody else finds them.

Everything follows from the home alone: a second terminal with the same `$DFLOW_HOME` gets the same addresses without a
setting. Unix socket addresses have room for 107 bytes (unix(7), sun_path); a home with a longer path has its sockets
in a private directory below /tmp, named after the home's owner and a hash of its path.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dflow.core.errors import ServerStartError

POSTGRES_PORT = 5432  # only names the socket file: nothing listens on TCP
DATABASE = "dflow"
ROLE = "dflow"
_SUN_PATH_MAX = 107
_LONGEST_SOCKET_NAME = len(f"/postgres/.s.PGSQL.{POSTGRES_PORT}.lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Locations:
    """The paths of one home's embedded servers."""

    home: Path
    postgres_data: Path
    postgres_sockets: Path
    redis_data: Path
    redis_socket: Path
    logs: Path
    run: Path

    @property
    def database_url(self) -> str:
        """The address of the embedded Postgres."""
        return postgres_url(self.postgres_sockets)

    @property
    def broker_url(self) -> str:
        """The address of the embedded Redis, as Celery writes it."""
        return redis_url(self.redis_socket)


def locations(home: Path) -> Locations:
    """Return where the embedded servers of this home live; creates nothing."""
    home = Path(os.path.abspath(home))
    sockets = _socket_root(home)
    return Locations(
        home=home,
        postgres_data=home / "postgres",
        postgres_sockets=sockets / "postgres",
        redis_data=home / "redis",
        redis_socket=sockets / "redis" / "redis.sock",
        logs=home / "logs",
        run=home / "run",
    )


def urls(home: Path) -> tuple[str, str]:
    """Return the addresses ``(database, broker)`` of the servers `dflow standalone` embeds for this home."""
    found = locations(home)
    return found.database_url, found.broker_url


def is_running(home: Path) -> bool:
    """Return whether this home's embedded Postgres has a socket to connect to."""
    return (locations(home).postgres_sockets / f".s.PGSQL.{POSTGRES_PORT}").exists()


def postgres_url(socket_dir: Path, database: str = DATABASE) -> str:
    """Return the address of a database behind a Unix socket; names the port, so that $PGPORT does not matter."""
    return f"postgresql://{ROLE}@/{database}?host={quote(str(socket_dir))}&port={POSTGRES_PORT}"


def redis_url(socket: Path) -> str:
    """Return a Redis address behind a Unix socket in Celery's spelling (kombu: ``redis+socket://``)."""
    return f"redis+socket://{quote(str(socket))}"


def private_directory(path: Path, owner: int | None = None) -> Path:
    """Create a directory only its owner may enter, or make sure an existing one is that.

    :param owner: the uid it shall belong to; the caller's when None. Only root can name another.
    :raises ServerStartError: it belongs to somebody else or is not a directory (a trap laid in /tmp).
    """
    owner = os.geteuid() if owner is None else owner
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    for directory in (path.parent, path):
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (owner, os.geteuid(), 0):
            raise ServerStartError(
                f"{directory} belongs to another user or is no directory. Remove it and start again."
            )
    if path.stat().st_uid != owner:
        os.chown(path, owner, -1)
    path.chmod(0o700)
    return path


def _socket_root(home: Path) -> Path:
    wanted = home / "run"
    if len(os.fsencode(wanted)) + _LONGEST_SOCKET_NAME <= _SUN_PATH_MAX:
        return wanted
    # Not tempfile.gettempdir(): another terminal may have another $TMPDIR and must find the same place.
    temporary = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())  # noqa: S108 - see private_directory
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    return temporary / f"dflow-{_owner(home)}-{digest}"


def _owner(home: Path) -> int:
    try:
        return home.stat().st_uid
    except OSError:
        return os.geteuid()

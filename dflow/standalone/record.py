"""What a supervisor leaves in its home: a lock, and a record of the processes it started.

The lock (flock(2)) is released by the kernel whenever the supervisor ends, however it ends. The record outlives it: the
next start finds in it what a killed supervisor left running, and ends that. Both lie in the home's `run` directory, for
the owner only, because the record may hold addresses with passwords.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dflow.core.errors import ConflictError
from dflow.embedded.process import ProcessIdentity, await_gone, end

RECORD_NAME: Final = "standalone.json"
_LOCK_NAME: Final = "standalone.lock"
_SERVERS: Final = {"redis": signal.SIGTERM, "postgres": signal.SIGINT}  # SIGINT: Postgres does not wait for clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A supervisor, the settings it was given beyond the configured ones, and its processes by name."""

    supervisor: ProcessIdentity
    overrides: Mapping[str, str] = field(default_factory=dict)  # "section.key" -> text
    processes: Mapping[str, ProcessIdentity] = field(default_factory=dict)

    def is_alive(self) -> bool:
        """Return whether that supervisor still runs."""
        return self.supervisor.find() is not None


def read(run_dir: Path) -> Record | None:
    """Return the record, or None when there is none that can be read."""
    try:
        data = json.loads((run_dir / RECORD_NAME).read_text())
        return Record(
            supervisor=_identity(data["supervisor"]),
            overrides=dict(data["overrides"]),
            processes={name: _identity(one) for name, one in data["processes"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(run_dir: Path, record: Record) -> None:
    """Replace the record, complete or not at all."""
    data = {
        "supervisor": _plain(record.supervisor),
        "overrides": dict(record.overrides),
        "processes": {name: _plain(one) for name, one in record.processes.items()},
    }
    draft = run_dir / f"{RECORD_NAME}.draft"
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(data, file, indent=1)
    draft.replace(run_dir / RECORD_NAME)


def remove(run_dir: Path) -> None:
    """Forget: everything was ended in good order."""
    (run_dir / RECORD_NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Be the only supervisor of this home while the block runs.

    :raises ConflictError: there is another one; says which.
    """
    descriptor = os.open(run_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = read(run_dir)
            who = f" (process {other.supervisor.pid})" if other and other.is_alive() else ""
            raise ConflictError(
                f"`dflow standalone` already runs{who} with the home {run_dir.parent}. Use that one, stop it first, or "
                "start another beside it with a home of its own: `DFLOW_HOME=/another/directory dflow standalone`."
            ) from None
        yield
    finally:
        os.close(descriptor)


def left_behind(run_dir: Path) -> dict[str, ProcessIdentity]:
    """Return what an earlier supervisor, killed before it could end it, left running, by name. Needs the lock."""
    record = read(run_dir)
    if record is None or record.is_alive():
        return {}
    return {name: one for name, one in record.processes.items() if one.find() is not None}


def end_left_behind(left: Mapping[str, ProcessIdentity], *, grace_seconds: float) -> None:
    """End what `left_behind` found.

    Only processes whose id and instant of creation are recorded are signalled, and their descendants. Most are ending
    by then: the kernel told them that their parent died.
    """
    programs = [one for name, one in left.items() if name not in _SERVERS]
    _end_together(programs, signal.SIGTERM, grace_seconds)
    for name, number in _SERVERS.items():  # last, so that the programs could write what they had to
        _end_together([left[name]] if name in left else [], number, grace_seconds)


def _end_together(processes: Sequence[ProcessIdentity], number: signal.Signals, grace_seconds: float) -> None:
    family = [member for one in processes for member in (one, *one.descendants())]
    for one in processes:
        one.send(number)
        one.send(signal.SIGCONT)  # one that is suspended could not obey
    deadline = time.monotonic() + grace_seconds
    for one in family:
        if not await_gone(one, max(0.0, deadline - time.monotonic())):
            end(one, (signal.SIGKILL, 5.0))


def _identity(data: Mapping[str, Any]) -> ProcessIdentity:
    return ProcessIdentity(pid=int(data["pid"]), created=float(data["created"]))


def _plain(identity: ProcessIdentity) -> dict[str, float]:
    return {"pid": identity.pid, "created": identity.created}

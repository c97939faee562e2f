"""Starting, recognising and ending processes that may outlive the one that started them.

A process is known by its id *and* the instant it was created: an id alone may have been given to somebody else since.
Nothing here ever looks for a process by name in order to signal it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dflow.embedded import launch

_CREATED_TOLERANCE_SECONDS = 2.0  # psutil derives the instant from boot time, which clock steps can move


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process that cannot be mistaken for another: its id, and when it was created (seconds since the epoch)."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """Return the identity of a living process, or None."""
        try:
            return cls(pid=pid, created=psutil.Process(pid).create_time())
        except psutil.Error:
            return None

    def descendants(self) -> list[ProcessIdentity]:
        """Return the living processes below it, as of now."""
        process = self.find()
        try:
            children = process.children(recursive=True) if process else []
        except psutil.Error:
            return []
        return [found for child in children if (found := ProcessIdentity.of(child.pid)) is not None]

    def send(self, number: signal.Signals) -> None:
        """Send a signal if the process still lives."""
        process = self.find()
        with contextlib.suppress(psutil.NoSuchProcess):
            if process is not None:
                process.send_signal(number)

    def find(self) -> psutil.Process | None:
        """Return the process if it still lives (a zombie does not), else None."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) <= _CREATED_TOLERANCE_SECONDS
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


def spawn(
    command: Sequence[str],
    *,
    log_file: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: tuple[int, int] | None = None,
    parent_death_signal: signal.Signals | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own with its output appended to a file.

    :param user: (uid, gid) to run as; needs root. See `dflow.embedded.launch`.
    :param parent_death_signal: what the kernel sends it when *the calling thread* dies (Linux only), so call this from
        a thread that lives as long as the program should: the main thread.
    """
    options: list[str] = []
    if user is not None:
        options += ["--user", f"{user[0]}:{user[1]}"]
    if parent_death_signal is not None:
        options += ["--parent-death-signal", str(int(parent_death_signal)), "--parent", str(os.getpid())]
    prefix = [sys.executable, "-I", "-S", launch.__file__, *options, "--"] if options else []
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        return subprocess.Popen(
            [*prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )


def end(identity: ProcessIdentity, *steps: tuple[signal.Signals, float]) -> bool:
    """Send each signal in turn and wait up to its number of seconds for the process to be gone; False if it stays."""
    for number, seconds in steps:
        identity.send(number)
        if await_gone(identity, seconds):
            return True
    return identity.find() is None


def await_gone(identity: ProcessIdentity, seconds: float) -> bool:
    """Wait until a process is gone or only its exit status is left; False when it still lives after that time.

    Not `psutil.Process.wait`: that would take a child's exit status away from its `Popen`, and wait in vain for an
    orphan that nobody reaps, as in a container whose first process does not.
    """
    deadline = time.monotonic() + seconds
    while identity.find() is not None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def tail(path: Path, *, lines: int = 15, start: int = 0) -> str:
    """Return the last lines of a text file, looking only behind byte `start`; empty when there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def size(path: Path) -> int:
    """Return a file's size in bytes, 0 when there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0

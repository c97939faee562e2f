"""One home and the supervisors started with it, for the tests of `dflow standalone` as a user meets it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2

from dflow.embedded import urls
from dflow.embedded.process import ProcessIdentity, end
from dflow.standalone import record
from tests.support import MARKER, eventually, marked_processes

# The terminal at file descriptor 0 becomes the session's own: when it is closed, the kernel sends SIGHUP.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Standalone:
    """One home and the supervisors started with it."""

    def __init__(self, home: Path, token: str, env: dict[str, str] | None = None) -> None:
        self.home, self.token, self.env = home, token, env or {}
        self.output_file = home.parent / f"{home.name}.out"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> Standalone:
        """Start it; returns when everything has been started."""
        self.spawn(*options)
        assert self.process is not None
        eventually(lambda: "In another terminal" in self.output() or self.process.poll() is not None, 90)
        assert self.process.poll() is None, self.output()
        return self

    def spawn(self, *options: str, terminal: int | None = None) -> subprocess.Popen[bytes]:
        """Start it in a session of its own, its output in a file, or with a terminal as all a user's terminal is."""
        command = [sys.executable, "-m", "dflow", "standalone", "--workers", "1", "--concurrency", "1", *options]
        self.output_file.unlink(missing_ok=True)
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                command if terminal is None else [sys.executable, "-c", _TAKE_TERMINAL, *command],
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=output if terminal is None else terminal,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env, "DFLOW_HOME": str(self.home), MARKER: self.token},
                start_new_session=True,
            )
        return self.process

    def output(self) -> str:
        return self.output_file.read_text()

    def processes(self) -> dict[str, ProcessIdentity]:
        found = record.read(self.home / "run")
        return dict(found.processes) if found else {}

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=120)

    def stop(self) -> None:
        """End it in a hurry, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=120)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `dflow ARGUMENTS` as another terminal would: it knows nothing but the home."""
        return self._call("dflow", *arguments)

    def celery(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `celery -A worker ARGUMENTS` likewise."""
        return self._call("celery", "-A", "worker", *arguments)

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command],
            env={**os.environ, "DFLOW_HOME": str(self.home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def execute(self, statement: str) -> Any:
        connection = psycopg2.connect(urls(self.home)[0])
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchone()[0] if cursor.description else None
        finally:
            connection.close()


@contextmanager
def homes() -> Iterator[Any]:
    """Give a function that makes a `Standalone` on a home of its own; ends them all and fails when something stays."""
    directory = Path(tempfile.mkdtemp(prefix="dflow-test-", dir="/tmp"))
    token = uuid.uuid4().hex
    made = []

    def make(name: str = "home", env: dict[str, str] | None = None) -> Standalone:
        made.append(Standalone(directory / name, token, env))
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.stop()
            print(one.output() if one.output_file.exists() else "never started")
        left = marked_processes(token)
        described = [(process.pid, process.name()) for process in left]
        for process in left:
            end(ProcessIdentity(pid=process.pid, created=process.create_time()), (signal.SIGKILL, 5))
        shutil.rmtree(directory)
    assert not described, f"left behind: {described}"

"""`dflow standalone` as a user meets it: started, stopped, killed, started twice, in the way of others."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import psutil
import psycopg2
import pytest

from dflow.embedded import urls
from dflow.embedded.process import ProcessIdentity, end
from dflow.standalone import record
from tests.support import MARKER, eventually, marked_processes

pytestmark = pytest.mark.integration


class Standalone:
    """One home and the supervisors started with it."""

    def __init__(self, home: Path, token: str) -> None:
        self.home, self.token = home, token
        self.output_file = home.parent / f"{home.name}.out"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> Standalone:
        """Start it; returns when everything has been started."""
        self.spawn(*options)
        eventually(lambda: "In another terminal" in self.output() or self.process.poll() is not None, 90)
        assert self.process.poll() is None, self.output()
        return self

    def spawn(self, *options: str) -> subprocess.Popen[bytes]:
        self.output_file.unlink(missing_ok=True)
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dflow", "standalone", "--workers", "1", "--concurrency", "1", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "DFLOW_HOME": str(self.home), MARKER: self.token},
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

    def execute(self, statement: str):
        connection = psycopg2.connect(urls(self.home)[0])
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchone()[0] if cursor.description else None
        finally:
            connection.close()


@pytest.fixture
def make(request):
    directory = Path(tempfile.mkdtemp(prefix="dflow-test-", dir="/tmp"))
    token = uuid.uuid4().hex
    made = []

    def make_one(name: str = "home") -> Standalone:
        made.append(Standalone(directory / name, token))
        return made[-1]

    yield make_one
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
            one.process.send_signal(signal.SIGTERM)
            one.process.wait(timeout=120)
        print(one.output() if one.output_file.exists() else "never started")
    left = marked_processes(token)
    described = [(process.pid, process.name()) for process in left]
    for process in left:
        end(ProcessIdentity(pid=process.pid, created=process.create_time()), (signal.SIGKILL, 5))
    shutil.rmtree(directory)
    assert not described, f"left behind: {described}"


@pytest.fixture
def standalone(make):
    return make()


def all_gone(identities):
    return all(one.find() is None for one in identities)


def test_ctrl_c_stops_everything_and_the_next_start_goes_on(standalone):
    standalone.start("--no-flower")
    names = {"postgres", "redis", "dag-processor", "scheduler", "worker-1"}
    eventually(lambda: set(standalone.processes()) == names)
    first = standalone.processes()
    standalone.execute("CREATE TABLE t AS SELECT 42 AS answer")
    assert standalone.interrupt() == 0, standalone.output()
    assert all_gone(first.values())
    assert not (standalone.home / "run" / record.RECORD_NAME).exists()
    assert "Stopped." in standalone.output()

    standalone.start("--no-flower")
    assert standalone.execute("SELECT answer FROM t") == 42
    assert (standalone.home / "logs" / "postgres.log.1").exists()


def test_after_a_kill_of_the_supervisor_the_next_start_finds_everything_in_order(standalone):
    standalone.start("--no-flower")
    before = standalone.processes()
    for one in before.values():
        # Deaf to the kernel's word that the parent died: orphans, as after a supervisor on another system.
        psutil.Process(one.pid).suspend()
    standalone.process.kill()
    standalone.process.wait()
    orphans = [one for one in before.values() if one.find() is not None]
    assert orphans
    standalone.start("--no-flower")
    assert all_gone(before.values())
    assert "An earlier supervisor was killed" in standalone.output()
    assert standalone.execute("SELECT 1") == 1


def test_a_component_that_is_killed_is_started_again_and_it_is_said(standalone):
    standalone.start("--no-flower")
    for name in ("scheduler", "redis", "postgres"):
        before = standalone.processes()[name]
        os.kill(before.pid, signal.SIGKILL)
        eventually(lambda: standalone.processes().get(name) not in (None, before), 30)  # noqa: B023 - called at once
        assert f"{name} was killed by signal 9" in standalone.output()
    eventually(lambda: standalone.execute("SELECT 1") == 1)


def test_a_second_supervisor_on_the_same_home_is_refused_and_one_on_another_is_not(standalone, make):
    standalone.start("--no-flower")
    second = Standalone(standalone.home, standalone.token)
    second.output_file = standalone.home.parent / "second.out"
    assert second.spawn("--no-flower").wait(timeout=60) == 1
    message = second.output().strip()
    assert f"already runs (process {standalone.process.pid})" in message
    assert "Traceback" not in message
    assert standalone.process.poll() is None
    other = make("other").start("--no-flower")
    assert other.execute("SELECT 1") == standalone.execute("SELECT 1") == 1


def test_a_taken_port_ends_in_one_message_and_nothing_running(standalone):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert standalone.spawn("--flower-port", str(port)).wait(timeout=60) == 1
    assert f"Flower cannot listen on 127.0.0.1:{port}" in standalone.output()
    assert "--flower-port" in standalone.output()
    assert "Traceback" not in standalone.output()


def test_a_home_that_cannot_be_made_ends_in_one_message(standalone):
    standalone.home.write_text("a file in the way")
    assert standalone.spawn().wait(timeout=60) != 0
    assert str(standalone.home) in standalone.output()
    assert "Traceback" not in standalone.output()
    standalone.home.unlink()

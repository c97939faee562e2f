"""`dflow standalone` as a user meets it: started, stopped, killed, started twice, in the way of others."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request

import psutil
import pytest

from dflow.standalone import record
from tests.standalone_rig import Standalone, homes
from tests.support import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def make():
    with homes() as make:
        yield make


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


def test_a_terminal_that_is_closed_stops_everything_in_good_order(standalone):
    ours, theirs = os.openpty()
    standalone.spawn("--no-flower", terminal=theirs)
    os.close(theirs)
    shown = b""
    while b"In another terminal" not in shown:
        shown += os.read(ours, 4096)
    before = standalone.processes()
    assert set(before) == {"postgres", "redis", "dag-processor", "scheduler", "worker-1"}
    os.close(ours)
    assert standalone.process.wait(timeout=120) == 0
    assert all_gone(before.values())
    assert not (standalone.home / "run" / record.RECORD_NAME).exists()
    assert "database system is shut down" in (standalone.home / "logs" / "postgres.log").read_text()


def test_flower_asks_for_the_login_of_the_home_and_knows_the_first_tasks_by_name(standalone):
    standalone.start()
    login_file = standalone.home / "flower-auth"
    assert login_file.stat().st_mode & 0o777 == 0o600
    login = login_file.read_text().strip()
    assert str(login_file) in standalone.output()
    assert login.split(":")[1] not in standalone.output() + (standalone.home / "run" / record.RECORD_NAME).read_text()
    address = re.search(r"Flower +(http://\S+)", standalone.output())[1]

    eventually(lambda: b": true" in fetch(f"{address}api/workers?status=1", login)[1], 60)
    assert fetch(f"{address}api/tasks", "dflow:wrong")[0] == fetch(address, None)[0] == 401
    triggered = standalone.command("dags", "trigger", "example_hello", "--wait", "--timeout", "60")
    assert triggered.returncode == 0, triggered

    def names():
        return {one["name"] for one in json.loads(fetch(f"{address}api/tasks", login)[1]).values()}

    eventually(lambda: names() == {"example_hello.name", "example_hello.greet"}, 30)
    inspected = standalone.celery("inspect", "active", "--timeout", "10")
    assert inspected.returncode == 0, inspected
    assert "1 node online" in inspected.stdout


def fetch(url, login):
    request = urllib.request.Request(url)
    if login is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 0, b""

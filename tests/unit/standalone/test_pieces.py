"""The supervisor's small parts: log rotation, ports, the record, restarts, what other commands find."""

from __future__ import annotations

import io
import os
import pwd
import socket
import subprocess
import sys

import pytest
from rich.console import Console

from dflow.core.errors import ConflictError, ServerStartError
from dflow.embedded.process import ProcessIdentity
from dflow.settings import load
from dflow.standalone import flower_login, log_files, ports, record
from dflow.standalone.attach import attach
from dflow.standalone.components import Component
from dflow.standalone.display import Display, Snapshot, short, summary
from dflow.standalone.supervisor import Supervisor, plan
from dflow.store.overview import RunLine, WorkerLine


def me():
    return ProcessIdentity.of(os.getpid())


def test_the_last_logs_are_kept(tmp_path):
    log = tmp_path / "x.log"
    for number in range(8):
        log.write_text(str(number))
        log_files.rotate(log, keep=3)
        log_files.rotate(log, keep=3)
    assert not log.exists()
    assert [(tmp_path / f"x.log.{n}").read_text() for n in (1, 2, 3)] == ["7", "6", "5"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_port_that_was_asked_for_and_is_taken_is_refused_by_name():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConflictError, match=rf"127\.0\.0\.1:{port}.*--flower-port"):
            ports.choose("127.0.0.1", port, is_explicit=True)
        assert ports.choose("127.0.0.1", port, is_explicit=False) > port


def test_a_record_survives_the_round_trip_and_is_private(tmp_path):
    written = record.Record(
        supervisor=me(), overrides={"core.executor": "LocalExecutor"}, processes={"scheduler": me()}
    )
    record.write(tmp_path, written)
    assert record.read(tmp_path) == written
    assert (tmp_path / record.RECORD_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{", "[]", '{"supervisor": 3}', '{"supervisor": {}, "overrides": {}}'])
def test_a_record_nobody_can_read_is_none(tmp_path, text):
    (tmp_path / record.RECORD_NAME).write_text(text)
    assert record.read(tmp_path) is None
    assert record.left_behind(tmp_path) == {}


def test_two_supervisors_on_one_home_are_one_too_many(tmp_path):
    record.write(tmp_path, record.Record(supervisor=me()))
    told = pytest.raises(ConflictError, match=rf"already runs \(process {os.getpid()}\)")
    with record.locked(tmp_path), told, record.locked(tmp_path):
        pass


def test_only_recorded_processes_are_ended_and_only_when_they_are_the_same(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
    sleeper.stdout.readline()
    identity = ProcessIdentity.of(sleeper.pid)
    gone = ProcessIdentity(pid=identity.pid, created=identity.created - 1000)
    try:
        stranger = ProcessIdentity(pid=os.getpid(), created=1.0)
        record.write(tmp_path, record.Record(supervisor=stranger, processes={"scheduler": gone, "worker-1": stranger}))
        assert record.left_behind(tmp_path) == {}
        assert sleeper.poll() is None
        record.write(tmp_path, record.Record(supervisor=stranger, processes={"scheduler": identity}))
        left = record.left_behind(tmp_path)
        assert left == {"scheduler": identity}
        record.end_left_behind(left, grace_seconds=5)
        assert sleeper.wait(5) == -15
    finally:
        sleeper.kill()
        sleeper.wait()
        sleeper.stdout.close()


def test_other_commands_find_what_the_supervisor_was_given(tmp_path):
    settings = load(home=tmp_path, env={})
    assert attach(settings, source="x").database.sql_alchemy_conn.startswith("postgresql://dflow@/dflow?host=")
    (tmp_path / "run").mkdir()
    given = {"core.executor": "LocalExecutor", "database.sql_alchemy_conn": "postgresql://me@db/dflow"}
    record.write(tmp_path / "run", record.Record(supervisor=me(), overrides=given))
    found = attach(settings, source="x")
    assert (found.core.executor, found.database.sql_alchemy_conn) == tuple(given.values())


def test_what_is_configured_is_never_replaced(tmp_path):
    env = {"DFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://me@db/mine"}
    settings = load(home=tmp_path, env=env)
    (tmp_path / "run").mkdir()
    record.write(tmp_path / "run", record.Record(supervisor=me(), overrides={"core.executor": "LocalExecutor"}))
    found = attach(settings, source="x")
    assert found.database.sql_alchemy_conn == "postgresql://me@db/mine"
    assert found.core.executor == "CeleryExecutor"
    assert found.celery.broker_url.startswith("redis+socket://")


class Crashing:
    """Ends as soon as it is started."""

    log_file = None
    identity = None

    def poll(self):
        return 3

    def start(self):
        pass


def test_restarts_pause_longer_with_each_crash_in_a_row():
    component = Component(name="x", runnable=Crashing())
    pauses = []
    for _ in range(8):
        component.start()
        pauses.append(component.notice_end())
        assert component.notice_end() is None, "an end is noticed once"
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    component.start()
    component.started_at -= 100
    assert component.notice_end() == 1


def test_the_summary_counts():
    assert summary(Snapshot()) == "runs: none yet; workers: 0 (0 of 0 slots busy)"
    run = RunLine(dag_id="d", run_id="r", state="running", cause=None, elapsed_seconds=1.0, counts={})
    worker = WorkerLine(name="w", hostname="h", state="live", executor="e", queues=("q",), concurrency=4, running=2)
    assert summary(Snapshot(runs=[run, run], workers=[worker])) == "runs: 2 running; workers: 1 (2 of 4 slots busy)"


@pytest.mark.parametrize(
    ("run_id", "shown"),
    [
        ("manual__2026-11-22T10:00:00.123456+00:00", "manual 2026-11-22 10:00:00"),
        ("scheduled__2026-11-22T00:00:00+00:00", "scheduled 2026-11-22 00:00:00"),
        ("manual__2026-11-22T10:00:00+01:00", "manual__2026-11-22T10:00:00+01:00"),
        ("my own [bold]", "my own [bold]"),
    ],
)
def test_the_live_table_cuts_long_names_before_states_and_shortens_the_ids_of_runs(run_id, shown):
    run = RunLine(dag_id="d" * 90, run_id=run_id, state="up_for_retry", cause=None, elapsed_seconds=61.23, counts={})
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Display(console) as display:
        display.show(Snapshot(runs=[run]))
        lines = console.file.getvalue().splitlines()
    assert any(all(text in line for text in (shown[:18], "up_for_retry", "61.2 s")) for line in lines), lines
    assert short(run_id) == shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_that_is_closed_does_not_disturb(is_terminal):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        with Display(Console(file=terminal, force_terminal=is_terminal)) as display:
            display.say("before")
            display.show(Snapshot())
            os.close(ours)
            for _ in range(3):
                display.say("after")
                display.show(Snapshot(broken=["a.py"]))
        assert os.stat(terminal.fileno()).st_rdev == os.stat(os.devnull).st_rdev


@pytest.mark.parametrize("is_terminal", [True, False])
def test_dag_files_that_could_not_be_read_are_told_with_the_first_few_reasons(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=70, color_system=None)
    with Display(console) as display:
        display.show(Snapshot(broken=["a.py:2: DAG 'a' takes no argument 'schedul'", "b.py", "c.py", "d.py"]))
        shown = console.file.getvalue()
    assert "4 DAG files could not be read (dflow dags list-import-errors):" in shown
    assert "a.py:2: DAG 'a' takes no argument 'schedul'" in shown
    assert "d.py" not in shown


def test_the_login_for_flower_is_made_once_random_and_private(tmp_path):
    login = flower_login.ensure(tmp_path)
    user, password = login.split(":")
    assert user == "dflow"
    assert len(password) >= 24
    assert flower_login.ensure(tmp_path) == login
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [("flower-auth", 0o600)]
    (tmp_path / "flower-auth").unlink()
    assert flower_login.ensure(tmp_path) != login


def test_a_login_for_flower_may_be_ones_own(tmp_path):
    (tmp_path / "flower-auth").write_text("ann:secret\n")
    assert flower_login.ensure(tmp_path) == "ann:secret"


@pytest.mark.parametrize("content", [b"secret", b":secret", b"ann:", b"ann:a\nbob:b", b"\xff\xfe:"])
def test_a_login_file_with_something_else_ends_in_one_message_that_keeps_it_secret(tmp_path, content):
    (tmp_path / "flower-auth").write_bytes(content)
    with pytest.raises(ServerStartError, match=r"flower-auth.*Remove it") as told:
        flower_login.ensure(tmp_path)
    assert "secret" not in str(told.value)


def supervisor_of(home) -> Supervisor:
    servers = {
        "DFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://nobody@/none",
        "DFLOW__CORE__EXECUTOR": "LocalExecutor",
    }
    settings = load(home=home, env=servers)
    return Supervisor(plan(settings, workers=1, flower=False), Display(Console(file=io.StringIO())))


def test_a_home_of_another_user_is_refused_naming_the_user(tmp_path, monkeypatch):
    (tmp_path / "home" / "run").mkdir(parents=True)
    name = pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(
        ServerStartError, match=rf"{tmp_path}/home was made by {name}\. Start dflow as that user, or set"
    ):
        supervisor_of(tmp_path / "home").run()


@pytest.mark.parametrize("name", ["", "logs", "run"])
def test_a_home_one_cannot_write_to_is_refused_naming_the_directory(tmp_path, monkeypatch, name):
    home = tmp_path / "home"
    monkeypatch.setattr(os, "access", lambda path, mode: path != home / name)  # modes mean nothing to root
    with pytest.raises(ServerStartError, match=rf"Cannot write to {home / name}\. .*DFLOW_HOME"):
        supervisor_of(home).run()

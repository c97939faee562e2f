"""The commands over a real database, with no component running: the test plays scheduler and worker by the store."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psycopg2
import pytest
import yaml

from dflow.cli import main
from dflow.core.spec import DagSpec, ScheduleSpec, TaskSpec
from dflow.core.states import Reason, RunState, TaskState
from dflow.settings import Settings
from dflow.store import dags, import_errors, logs, runs, tasks
from dflow.store.apply import Change, apply
from dflow.store.engine import Store
from dflow.store.logs import Chunk, Line
from tests.support import eventually

pytestmark = pytest.mark.integration

N, S, Q, R = TaskState.NONE, TaskState.SCHEDULED, TaskState.QUEUED, TaskState.RUNNING
WORKER = "11111111-1111-1111-1111-111111111111"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Dflow = Callable[..., Done]


@pytest.fixture
def env(settings: Settings, store: Store) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DFLOW")}
    return {**inherited, **settings.as_env()}


@pytest.fixture
def dflow(env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dflow:
    """Run `dflow ARGUMENTS` in this process, which is quick, and return what it printed."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["dflow", *arguments])
        capsys.readouterr()
        code = main._run()
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def etl(store: Store) -> str:
    spec = DagSpec(
        dag_id="etl",
        tasks=(
            TaskSpec(task_id="extract", operator="BashOperator", retries=1),
            TaskSpec(task_id="load", operator="PythonOperator", upstream=("extract",), queue="heavy"),
        ),
        schedule=ScheduleSpec(kind="cron", expression="0 3 * * *", summary="@daily"),
        params={"n": {"value": 1, "description": None, "schema": {"type": "integer"}}},
        tags=("daily",),
    )
    with store.begin() as tx:
        upserted = dags.upsert(tx, spec, bundle_name="dags", path="etl.py", bundle_hash="h", paused_default=False)
        dags.put_code(tx, upserted.version_id, "etl.py", "0" * 64, "x = '[bold]'\n")
    return spec.dag_id


@dataclass
class Hand:
    """Moves one task instance by hand."""

    store: Store
    ti_id: int
    attempt_id: str | None = None

    def move(self, to_state: TaskState, reason: Reason = Reason.READY, **more: object) -> None:
        with self.store.begin() as tx:
            ti = tasks.get_by_id(tx, self.ti_id)
            assert ti is not None
            change = Change(
                ti_id=ti.id,
                from_state=TaskState(ti.state),
                to_state=to_state,
                reason=reason,
                attempt_id=ti.attempt_id,
                actor="test",
                **more,  # type: ignore[arg-type]
            )
            (applied,) = apply(tx, [change])
        self.attempt_id = applied.attempt_id or self.attempt_id

    def start(self) -> None:
        self.move(S)
        self.move(Q, Reason.ADMITTED)
        self.move(R, Reason.CLAIMED, worker_id=WORKER, hostname="host-a", pid=7)

    def say(self, seq: int, *texts: str) -> None:
        assert self.attempt_id is not None
        lines = [Line(1_700_000_000.5, "INFO", "stdout", text) for text in texts]
        with self.store.begin() as tx:
            logs.append(tx, [Chunk(attempt_id=self.attempt_id, seq=seq, ti_id=self.ti_id, lines=lines)])


@pytest.fixture
def run(store: Store, dflow: Dflow, etl: str) -> runs.Run:
    assert dflow("dags", "trigger", etl, "--run-id", "r1").code == 0
    with store.begin() as tx:
        return runs.get(tx, etl, "r1")


@pytest.fixture
def extract(store: Store, run: runs.Run) -> Hand:
    with store.begin() as tx:
        return Hand(store, tasks.get(tx, "etl", run.run_id, "extract").id)


def _end(store: Store, run: runs.Run, state: RunState) -> None:
    with store.begin() as tx:
        runs.start_queued(tx, 10)
        runs.end(tx, run.id, state, None if state is RunState.SUCCESS else "a task failed")


# DAGs


def test_listing_dags_in_every_form(dflow: Dflow, etl: str, store: Store) -> None:
    assert [row["dag_id"] for row in json.loads(dflow("dags", "list", "-o", "json").out)] == ["etl"]
    assert yaml.safe_load(dflow("dags", "list", "-o", "yaml").out)[0]["tags"] == ["daily"]
    assert dflow("dags", "list", "-o", "plain").out.splitlines()[1].startswith("etl\tno\t@daily")
    assert "etl.py" in dflow("dags", "list").out
    assert json.loads(dflow("dags", "list", "--tag", "other", "-o", "json").out) == []
    details = json.loads(dflow("dags", "details", "etl", "-o", "json").out)
    assert (details["tasks"], details["version_number"]) == (2, 1)
    assert dflow("dags", "code", "etl").out == "x = '[bold]'\n"


def test_an_unknown_dag_is_told_with_the_nearest(dflow: Dflow, etl: str) -> None:
    for command in (("dags", "details"), ("dags", "trigger"), ("dags", "pause"), ("runs", "list"), ("tasks", "list")):
        done = dflow(*command, "elt")
        assert done.code == 1
        assert done.err.startswith("Error: There is no DAG 'elt'. Did you mean 'etl'?")


def test_import_errors_are_listed_and_make_exit_1(dflow: Dflow, etl: str, store: Store) -> None:
    assert dflow("dags", "list-import-errors").code == 0
    with store.begin() as tx:
        import_errors.set_(tx, bundle_name="dags", path="bad.py", message="NameError: x", traceback="line 3\nNameError")
    done = dflow("dags", "list-import-errors", "-o", "json")
    assert (done.code, json.loads(done.out)[0]["message"]) == (1, "NameError: x")
    assert "line 3\nNameError" in dflow("dags", "list-import-errors", "--traceback").out
    assert "1 file could not be read" in dflow("dags", "list").err


def test_next_runs_follow_the_schedule(dflow: Dflow, etl: str) -> None:
    rows = json.loads(dflow("dags", "next-runs", "etl", "-n", "3", "-o", "json").out)
    instants = [datetime.fromisoformat(row["run_after"]) for row in rows]
    assert [(one.hour, one.minute) for one in instants] == [(3, 0)] * 3
    assert {(later - earlier).days for earlier, later in zip(instants, instants[1:], strict=False)} == {1}


def test_trigger_checks_conf_before_anything_is_made(dflow: Dflow, etl: str) -> None:
    bad_json = dflow("dags", "trigger", "etl", "--conf", '{"n": x}')
    assert bad_json.code == 2
    assert "line 1, column 7" in bad_json.err
    bad_param = dflow("dags", "trigger", "etl", "--conf", '{"n": "x"}')
    assert bad_param.code == 2
    assert "'x' is not of type 'integer'" in bad_param.err
    assert json.loads(dflow("runs", "list", "-o", "json").out) == []


def test_trigger_makes_a_run_and_says_what_would_keep_it_waiting(dflow: Dflow, etl: str) -> None:
    assert "paused" in dflow("dags", "pause", "etl").err
    done = dflow("dags", "trigger", "etl", "--conf", '{"n": 2}', "--logical-date", "2026-01-01T00:00", "-o", "json")
    made = json.loads(done.out)
    assert (done.code, made["state"], made["run_type"]) == (0, "queued", "manual")
    assert made["logical_date"] == "2026-01-01T00:00:00+00:00"
    assert "The DAG etl is paused" in done.err
    assert "No scheduler has ever run" in done.err
    assert "No worker of the CeleryExecutor is alive" in done.err
    again = dflow("dags", "trigger", "etl", "--run-id", made["run_id"], "--unpause")
    assert (again.code, "already has a run" in again.err) == (1, True)
    assert "is unpaused already" not in dflow("dags", "unpause", "etl").err  # the failed trigger changed nothing
    assert json.loads(dflow("runs", "show", "etl", "latest", "-o", "json").out)["conf"] == {"n": 2}


def test_a_queue_nobody_consumes_is_named(dflow: Dflow, etl: str, store: Store) -> None:
    from dflow.store import services, workers

    with store.begin() as tx:
        services.register(tx, service_id=WORKER, kind="scheduler", hostname="h", pid=1, version="0")
        workers.register(
            tx, worker_id=WORKER, name="w", hostname="h", pid=1, executor="CeleryExecutor", queues=["default"],
            concurrency=2, lease_seconds=60, version="0",
        )  # fmt: skip
    done = dflow("dags", "trigger", "etl")
    assert [line for line in done.err.splitlines() if "Warning" in line] == [
        "Warning: No worker consumes the queue 'heavy'; start one with `dflow worker -q heavy`."
    ]


def test_reserialize_reads_the_folder_once(dflow: Dflow, settings: Settings) -> None:
    folder = settings.core.dags_folder
    (folder / "good.py").write_text("from dflow import DAG\nwith DAG('good', schedule=None):\n    pass\n")
    (folder / "bad.py").write_text("from dflow import DAG\nraise ValueError('no')\n")
    done = dflow("dags", "reserialize")
    assert done.code == 1
    assert "parsed: 2" in done.err
    assert [row["dag_id"] for row in json.loads(dflow("dags", "list", "-o", "json").out)] == ["good"]
    assert "ValueError: no" in dflow("dags", "list-import-errors").out
    (folder / "bad.py").unlink()
    assert dflow("dags", "reserialize").code == 0
    assert "from dflow import DAG" in dflow("dags", "code", "good").out


# Runs and tasks


def test_runs_show_cancel_and_wait(dflow: Dflow, run: runs.Run, store: Store) -> None:
    shown = json.loads(dflow("runs", "show", "etl", "r1", "-o", "json").out)
    assert [task["state"] for task in shown["tasks"]] == ["none", "none"]
    assert shown["triggered_by"].startswith("user ")
    assert json.loads(dflow("runs", "list", "etl", "--state", "failed", "-o", "json").out) == []
    assert "is cancelled" in dflow("runs", "cancel", "etl", "r1").err
    again = dflow("runs", "cancel", "etl", "r1")
    assert (again.code, "has ended already" in again.err) == (1, True)
    waited = dflow("runs", "wait", "etl", "latest")
    assert waited.code == 1
    assert "failed in" in waited.out
    assert "cancelled by" in waited.out


def test_a_failed_run_names_its_tasks_and_where_to_read_on(
    dflow: Dflow, run: runs.Run, extract: Hand, store: Store
) -> None:
    extract.start()
    extract.move(TaskState.FAILED, Reason.RAISED, cause="ValueError: bad zone")
    _end(store, run, RunState.FAILED)
    done = dflow("runs", "wait", "etl", "r1")
    assert done.code == 1
    assert "  extract failed: ValueError: bad zone\n    dflow tasks logs etl r1 extract\n" in done.out
    as_json = json.loads(dflow("runs", "wait", "etl", "r1", "-o", "json").out)
    assert as_json["failed_tasks"][0]["cause"] == "ValueError: bad zone"
    assert "ValueError: bad zone" in dflow("runs", "show", "etl", "r1").out


def test_tasks_and_their_history(dflow: Dflow, run: runs.Run, extract: Hand) -> None:
    assert [row["task_id"] for row in json.loads(dflow("tasks", "list", "etl", "-o", "json").out)] == [
        "extract",
        "load",
    ]
    assert "has not started yet (none)" in dflow("tasks", "logs", "etl", "r1", "extract").err
    extract.start()
    extract.move(TaskState.UP_FOR_RETRY, Reason.RAISED, cause="boom", user_failure=True, delay_seconds=60)
    states = json.loads(dflow("tasks", "states", "etl", "latest", "-o", "json").out)
    assert [(row["task_id"], row["state"]) for row in states] == [("extract", "up_for_retry"), ("load", "none")]
    tries = json.loads(dflow("tasks", "attempts", "etl", "r1", "extract", "-o", "json").out)
    assert [(row["try_number"], row["cause"], row["hostname"]) for row in tries] == [(1, "boom", "host-a")]
    steps = json.loads(dflow("tasks", "events", "etl", "r1", "extract", "-o", "json").out)
    assert [row["to_state"] for row in steps] == ["scheduled", "queued", "running", "up_for_retry"]
    assert dflow("tasks", "logs", "etl", "r1", "extrct").code == 1


def test_task_instances_are_listed_upstream_first_and_the_logical_date_is_that_of_the_run(
    dflow: Dflow, store: Store
) -> None:
    spec = DagSpec(
        dag_id="order",
        tasks=(
            TaskSpec(task_id="last", operator="EmptyOperator", upstream=("middle",)),
            TaskSpec(task_id="middle", operator="EmptyOperator", upstream=("start",)),
            TaskSpec(task_id="start", operator="EmptyOperator"),
        ),
    )
    with store.begin() as tx:
        dags.upsert(tx, spec, bundle_name="dags", path="order.py", bundle_hash="h", paused_default=False)
    assert dflow("dags", "trigger", "order").code == 0
    shown = json.loads(dflow("runs", "show", "order", "latest", "-o", "json").out)
    assert [row["task_id"] for row in shown["tasks"]] == ["start", "middle", "last"]
    states = json.loads(dflow("tasks", "states", "order", "latest", "-o", "json").out)
    assert [row["task_id"] for row in states] == ["start", "middle", "last"]
    assert shown["run_id"] == f"manual__{shown['logical_date']}"
    assert shown["logical_date"] == shown["run_after"]


def test_logs_of_a_try(dflow: Dflow, run: runs.Run, extract: Hand) -> None:
    extract.start()
    extract.say(0, "first [bold]", "zwei \N{SNOWMAN}")
    extract.say(1, "last")
    assert dflow("tasks", "logs", "etl", "r1", "extract", "--raw").out == "first [bold]\nzwei \N{SNOWMAN}\nlast\n"
    assert dflow("tasks", "logs", "etl", "r1", "extract").out.splitlines()[2] == (
        "2023-11-14T22:13:20.500Z INFO    stdout: last"
    )
    extract.move(TaskState.UP_FOR_RETRY, Reason.RAISED, user_failure=True, delay_seconds=0)
    extract.start()
    extract.say(0, "again")
    assert dflow("tasks", "logs", "etl", "r1", "extract", "--raw").out == "again\n"
    assert "last" in dflow("tasks", "logs", "etl", "r1", "extract", "--try", "1").out
    missing = dflow("tasks", "logs", "etl", "r1", "extract", "--try", "3")
    assert (missing.code, "tries: 1, 2" in missing.err) == (1, True)


def test_logs_are_followed_over_a_retry_to_the_end(run: runs.Run, extract: Hand, env: dict[str, str]) -> None:
    with _Program(env, "tasks", "logs", "etl", "r1", "extract", "--follow", "--raw") as program:
        extract.start()
        extract.say(0, "one")
        assert program.line() == "one"
        extract.move(TaskState.UP_FOR_RETRY, Reason.RAISED, user_failure=True, delay_seconds=0)
        extract.start()
        extract.say(0, "two")
        assert program.line() == "two"
        extract.say(1, "three")
        extract.move(TaskState.SUCCESS, Reason.SUCCEEDED)
        assert program.line() == "three"
        assert program.end() == 0
    assert "--- try 2" in program.errors


# Waiting


class _Program:
    """A `dflow` process whose lines a test reads as they come; killed at the end of the block if it is still there."""

    def __init__(self, env: dict[str, str], *arguments: str, stderr: int = subprocess.PIPE) -> None:
        self.errors = ""
        self._is_stderr_ours = stderr == subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dflow", *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self._watchdog = threading.Timer(60, self.process.kill)  # a reader of a silent process would wait for ever
        self._watchdog.start()

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def error_line(self, containing: str) -> str:
        """The next line of standard error with that text."""
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            self.errors += line
            if containing in line:
                return line
        raise AssertionError(f"no {containing!r} in {self.errors!r}")

    def end(self) -> int:
        if self._is_stderr_ours and self.process.stderr is not None and not self.process.stderr.closed:
            self.errors += self.process.stderr.read()
        code = self.process.wait(30)
        self._watchdog.cancel()
        return code


def test_trigger_wait_shows_changes_and_ends_with_0(store: Store, etl: str, env: dict[str, str]) -> None:
    with _Program(env, "dags", "trigger", "etl", "--run-id", "r1", "--wait") as program:
        program.error_line("etl queued  2 none")
        with store.begin() as tx:
            run = runs.get(tx, "etl", "r1")
            hand = Hand(store, tasks.get(tx, "etl", "r1", "extract").id)
        hand.start()
        program.error_line("1 none  1 running")
        hand.move(TaskState.SUCCESS, Reason.SUCCEEDED)
        program.error_line("1 none  1 success")
        _end(store, run, RunState.SUCCESS)
        assert program.line().startswith("etl r1 success in ")
        assert program.end() == 0
    assert "\x1b" not in program.errors


def test_ctrl_c_leaves_the_run_alone(store: Store, run: runs.Run, env: dict[str, str]) -> None:
    with _Program(env, "runs", "wait", "etl", "r1") as program:
        program.error_line("etl queued")
        program.process.send_signal(signal.SIGINT)
        assert program.end() == 130
    assert "The run goes on" in program.errors
    assert "Traceback" not in program.errors
    with store.begin() as tx:
        assert runs.get(tx, "etl", "r1").state == RunState.QUEUED


def test_out_of_time(dflow: Dflow, run: runs.Run) -> None:
    done = dflow("runs", "wait", "etl", "r1", "--timeout", "0.1")
    assert done.code == 124
    assert "it goes on" in done.err


@pytest.fixture
def admin(pg_url: str) -> Iterator[Callable[[str], None]]:
    """Run a statement from another database of the same server; ``{db}`` is the test's."""
    name = pg_url.partition("@/")[2].partition("?")[0]
    connection = psycopg2.connect(pg_url.replace(f"/{name}?", "/postgres?"))
    connection.autocommit = True

    def execute(statement: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement.format(db=name))

    yield execute
    connection.close()


def test_a_database_that_goes_away_is_waited_for(
    store: Store, run: runs.Run, env: dict[str, str], admin: Callable[[str], None]
) -> None:
    with _Program(env, "runs", "wait", "etl", "r1") as program:
        program.error_line("etl queued")
        admin('ALTER DATABASE "{db}" ALLOW_CONNECTIONS false')
        try:
            admin("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{db}'")
            program.error_line("still trying")
        finally:
            admin('ALTER DATABASE "{db}" ALLOW_CONNECTIONS true')
        program.error_line("The database is back")
        _end(store, run, RunState.SUCCESS)
        assert program.end() == 0


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_one_line_is_kept_up_to_date(
    store: Store, run: runs.Run, extract: Hand, env: dict[str, str], no_color: str
) -> None:
    ours, theirs = pty.openpty()
    env = {**env, "TERM": "xterm-256color", "NO_COLOR": no_color, "COLUMNS": "100"}
    seen = ""
    with _Program(env, "runs", "wait", "etl", "r1", stderr=theirs) as program:
        os.close(theirs)

        def shows(text: str) -> bool:
            nonlocal seen
            seen += os.read(ours, 65536).decode()
            return text in seen

        eventually(lambda: shows("none"), interval_seconds=0)
        extract.start()
        eventually(lambda: shows("running"), interval_seconds=0)
        _end(store, run, RunState.SUCCESS)
        assert program.end() == 0
    os.close(ours)
    assert ("\x1b" in seen) is not bool(no_color)
    if not no_color:
        assert seen.count("\n") <= 2  # updated in place


# The rest


def test_pools(dflow: Dflow, etl: str) -> None:
    assert "5 slots" in dflow("pools", "set", "api", "5", "calls to the partner").err
    assert "no limit" in dflow("pools", "set", "big", "--", "-1").err
    rows = {row["name"]: row for row in json.loads(dflow("pools", "list", "-o", "json").out)}
    assert (rows["api"]["slots"], rows["api"]["open"], rows["big"]["open"]) == (5, 5, None)
    assert json.loads(dflow("pools", "get", "api", "-o", "json").out)["description"] == "calls to the partner"
    assert dflow("pools", "delete", "api").code == 0
    assert "Did you mean" in dflow("pools", "get", "bigg").err
    assert dflow("pools", "delete", "default_pool").code == 1


def test_the_schema(dflow: Dflow, etl: str) -> None:
    assert dflow("db", "check").code == 0
    assert "already" in dflow("db", "migrate").err
    revision = dflow("db", "current").out.strip()
    assert "Add --yes" in dflow("db", "reset").err
    assert dflow("db", "downgrade", "base", "--yes").code == 0
    missing = dflow("dags", "list")
    assert (missing.code, missing.err) == (1, missing.err)
    assert "has no dflow schema yet. Run `dflow db migrate`" in missing.err
    assert dflow("db", "check", "--wait", "0.6").code == 1
    assert dflow("db", "current").out == ""
    assert f"revision {revision}" in dflow("db", "migrate").err
    assert json.loads(dflow("dags", "list", "-o", "json").out) == []


def test_the_printed_sql_makes_the_schema(dflow: Dflow, empty_pg_url: str) -> None:
    connection = psycopg2.connect(empty_pg_url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(dflow("db", "sql").out)
    connection.close()
    os.environ["DFLOW__DATABASE__SQL_ALCHEMY_CONN"] = empty_pg_url  # restored by the fixture of `dflow`
    assert dflow("db", "check").code == 0


def test_info(dflow: Dflow, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = json.loads(dflow("info", "-o", "json").out)
    assert (shown["home"], shown["broker"]) == (str(settings.home), "answers")
    assert shown["database"].startswith("answers, schema at revision")
    assert "None is alive." in dflow("info").out
    monkeypatch.setenv("DFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://ann:hunter2@127.0.0.1:1/x")
    monkeypatch.setenv("DFLOW__CELERY__BROKER_URL", "redis://:hunter2@127.0.0.1:1/0")
    away = dflow("info")
    assert away.code == 0
    assert away.out.count("away: ") == 2
    assert "hunter2" not in away.out + away.err


def test_every_listing_has_every_form(dflow: Dflow, run: runs.Run, extract: Hand, tmp_path: Path) -> None:
    extract.start()
    listings = [
        ("dags", "list"),
        ("dags", "next-runs", "etl"),
        ("dags", "list-import-errors"),
        ("runs", "list"),
        ("tasks", "list", "etl"),
        ("tasks", "states", "etl", "r1"),
        ("tasks", "attempts", "etl", "r1", "extract"),
        ("tasks", "events", "etl", "r1", "extract"),
        ("pools", "list"),
        ("config", "list"),
    ]
    for listing in listings:
        assert dflow(*listing).code == 0
        from_json = json.loads(dflow(*listing, "--output", "json").out)
        assert yaml.safe_load(dflow(*listing, "--output", "yaml").out) == from_json
        plain = dflow(*listing, "--output", "plain").out.splitlines()
        assert len(plain) == len(from_json) + 1

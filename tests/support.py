"""What the tests share: waiting for facts, and a real cluster of processes with the invariants every test ends with.

`eventually` waits for a fact with a deadline, never for a time. `Cluster` starts the components as separate processes,
each in a session of its own, marks them through their environment so that none can be left behind unnoticed, and keeps
their logs. `check_invariants` reads nothing but rows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
from sqlalchemy import Connection, text

from dflow.core.states import LEGAL_TRANSITIONS, RunType
from dflow.embedded.process import ProcessIdentity, end, tail
from dflow.settings import Settings
from dflow.store.engine import Store

T = TypeVar("T")
MARKER = "DFLOW_TEST_CLUSTER"


def eventually(
    predicate: Callable[[], T], deadline_seconds: float = 30.0, *, interval_seconds: float = 0.05, message: str = ""
) -> T:
    """Return the predicate's first truthy result; fail with its last result or error when the deadline passes."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        try:
            last: Any = predicate()
            if last:
                return last
        except AssertionError as error:
            last = error
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {deadline_seconds:g} s: {message or predicate}; at the end: {last!r}")
        time.sleep(interval_seconds)


@dataclass
class Component:
    """One started process."""

    name: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_running(self) -> bool:
        return self.process.poll() is None

    def children(self) -> list[psutil.Process]:
        """The process's descendants, as of now."""
        return psutil.Process(self.pid).children(recursive=True)

    def log(self) -> str:
        return tail(self.log_file, lines=100_000)


class Cluster:
    """Real components of one test, over one database and one broker."""

    def __init__(self, settings: Settings, store: Store, log_dir: Path) -> None:
        self.settings, self.store = settings, store
        self.log_dir = log_dir
        self.components: list[Component] = []
        self.token = uuid.uuid4().hex
        self._env = {**os.environ, **settings.as_env(), MARKER: self.token, "PYTHONUNBUFFERED": "1"}

    # Starting

    def start(self, *, schedulers: int = 1, workers: int = 1, concurrency: int = 2) -> Cluster:
        """Start a dag-processor, schedulers and workers; returns when they are registered."""
        self.dag_processor()
        for _ in range(schedulers):
            self.scheduler()
        for _ in range(workers):
            self.worker(concurrency=concurrency)
        if workers:
            eventually(lambda: self.count("SELECT count(*) FROM worker WHERE state = 'live'") >= workers, 60)
        return self

    def dag_processor(self) -> Component:
        return self.run("dag-processor")

    def scheduler(self) -> Component:
        return self.run("scheduler")

    def worker(
        self, *, concurrency: int = 2, queues: Sequence[str] = ("default",), name: str | None = None
    ) -> Component:
        name = name or f"w{len(self.components)}-{self.token[:6]}"
        return self.run(
            "worker", "--name", name, "--concurrency", str(concurrency), "--queues", ",".join(queues), label=name
        )

    def run(self, *arguments: str, label: str | None = None, env: dict[str, str] | None = None) -> Component:
        """Start `dflow ARGUMENTS` in a session of its own, its output in a file of the test's log directory."""
        return self._run(["dflow", *arguments], label or arguments[0], env)

    def celery(self, *arguments: str, label: str | None = None, env: dict[str, str] | None = None) -> Component:
        """Start `celery -A worker ARGUMENTS` likewise."""
        return self._run(["celery", "-A", "worker", *arguments], label or arguments[0], env)

    def celery_output(self, *arguments: str) -> str:
        """Run `celery -A worker ARGUMENTS` to its end and return what it prints; fails when it fails."""
        command = [sys.executable, "-m", "celery", "-A", "worker", *arguments]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done
        return done.stdout

    def _run(self, arguments: Sequence[str], label: str, env: dict[str, str] | None) -> Component:
        number = sum(one.name.startswith(label) for one in self.components)
        name = f"{label}-{number}" if number else label
        log_file = self.log_dir / f"{name}.log"
        with log_file.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._env, **(env or {})},
                start_new_session=True,
            )
        self.components.append(Component(name, process, log_file))
        return self.components[-1]

    # Ending

    def kill(self, component: Component, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the component's main process; after SIGKILL its status is collected."""
        component.process.send_signal(number)
        if number == signal.SIGKILL:
            component.process.wait(timeout=30)

    def stop(self) -> None:
        """End everything and fail when a process does not end or was left behind."""
        running = [one for one in self.components if one.is_running()]
        for one in running:
            one.process.send_signal(signal.SIGTERM)
        slow = [one.name for one in running if not _ended_within(one, 30)]
        for one in running:
            if one.is_running():
                one.process.kill()
                one.process.wait(timeout=10)
        left = self._end_leftovers()
        assert not slow, f"did not end within 30 s of SIGTERM: {slow}"
        assert not left, f"left behind: {left}"

    def marked_processes(self) -> list[psutil.Process]:
        """Every living process of this cluster, however it came to be."""
        return marked_processes(self.token)

    def _end_leftovers(self) -> list[str]:
        deadline = time.monotonic() + 10
        while (left := self.marked_processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        described = []
        for process in left:
            identity = ProcessIdentity.of(process.pid)
            if identity is not None:
                described.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
                end(identity, (signal.SIGKILL, 5.0))
        return described

    # Doing

    def add_dag(self, name: str, source: str) -> Path:
        """Write a DAG file into the DAG folder, complete or not at all."""
        folder = self.settings.core.dags_folder
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{name}.draft"
        draft.write_text(source)
        return draft.replace(folder / name)

    def wait_dag(self, dag_id: str, deadline_seconds: float = 60.0) -> None:
        """Wait until the dag-processor has stored the DAG."""
        query = "SELECT count(*) FROM dag WHERE dag_id = :d AND version_id IS NOT NULL"
        try:
            eventually(lambda: self.count(query, d=dag_id), deadline_seconds, message=f"DAG {dag_id} is stored")
        except AssertionError as error:
            errors = self.rows("SELECT path, traceback FROM import_error")
            raise AssertionError(f"{error}\nimport errors: {errors}") from None

    def trigger(self, dag_id: str, conf: dict[str, Any] | None = None, run_id: str | None = None) -> int:
        """Create a manual run of a DAG, which is awaited and unpaused; returns its ``dag_run.id``."""
        from dflow.store import runs

        self.wait_dag(dag_id)
        now = datetime.now(UTC)
        with self.store.begin() as tx:
            tx.execute(text("UPDATE dag SET is_paused = false WHERE dag_id = :d AND is_paused"), {"d": dag_id})
            run = runs.create(
                tx,
                dag_id=dag_id,
                run_id=run_id,
                run_type=RunType.MANUAL,
                logical_date=now,
                data_interval_start=now,
                data_interval_end=now,
                run_after=now,
                conf=conf or {},
                triggered_by="test",
            )
        return int(run.id)

    def wait_run(self, run_pk: int, deadline_seconds: float = 60.0, state: str | None = None) -> Any:
        """Wait for a run's end and return its row; fails showing the states of its task instances."""
        query = "SELECT * FROM dag_run WHERE id = :r AND ended_at IS NOT NULL"
        try:
            (row,) = eventually(lambda: self.rows(query, r=run_pk), deadline_seconds, message=f"run {run_pk} has ended")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.describe(run_pk)}") from None
        assert state in (None, row.state), f"the run ended {row.state}, not {state}: {self.describe(run_pk)}"
        return row

    def states(self, run_pk: int) -> dict[str, str]:
        """Return the state of each task instance: ``task_id`` or ``task_id[map_index]``."""
        found = self.rows("SELECT task_id, map_index, state FROM task_instance WHERE run_pk = :r ORDER BY id", r=run_pk)
        return {one.task_id if one.map_index < 0 else f"{one.task_id}[{one.map_index}]": one.state for one in found}

    def describe(self, run_pk: int) -> str:
        """Show a run and its task instances for a failure's message."""
        run = self.rows("SELECT dag_id, run_id, state, cause FROM dag_run WHERE id = :r", r=run_pk)
        tasks = self.rows(
            "SELECT task_id, map_index, state, reason, cause, try_number FROM task_instance WHERE run_pk = :r"
            " AND state <> 'success' ORDER BY id LIMIT 40",
            r=run_pk,
        )
        return "\n".join(str(tuple(row)) for row in [*run, *tasks])

    def rows(self, query: str, **values: Any) -> Sequence[Any]:
        with self.store.begin() as tx:
            return tx.execute(text(query), values).all()

    def count(self, query: str, **values: Any) -> int:
        return int(self.rows(query, **values)[0][0])

    def invariants(self) -> None:
        """Assert the shared invariants over all rows; waits a moment for the scheduler's inbox to be emptied."""
        eventually(lambda: self.count("SELECT count(*) FROM unaccounted") == 0, 20, message="the inbox is empty")
        with self.store.begin() as tx:
            check_invariants(tx)

    def log_tails(self, lines: int = 60) -> list[tuple[str, str]]:
        """Return a title and the end of the log for each component."""
        tails = []
        for one in self.components:
            status = "running" if one.is_running() else f"ended with {one.process.returncode}"
            tails.append((f"{one.name} ({status})", tail(one.log_file, lines=lines)))
        return tails


def marked_processes(token: str) -> list[psutil.Process]:
    """Every living process started, however indirectly, with this token in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _ended_within(component: Component, seconds: float) -> bool:
    try:
        component.process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


# Each query returns the offenders: no row means that the invariant holds.
_INVARIANTS = {
    "a task instance is active although its run has ended": """
        SELECT t.id, t.task_id, t.state, r.state FROM task_instance t JOIN dag_run r ON r.id = t.run_pk
        WHERE r.ended_at IS NOT NULL
          AND t.state NOT IN ('success', 'failed', 'skipped', 'upstream_failed', 'removed')""",
    "starts and ended attempts do not match": """
        SELECT t.id, t.task_id, t.state, t.try_number, e.starts, a.ends FROM task_instance t
        CROSS JOIN LATERAL (SELECT count(*) starts FROM ti_event WHERE ti_id = t.id AND to_state = 'running') e
        CROSS JOIN LATERAL (SELECT count(*) ends FROM attempt WHERE ti_id = t.id) a
        WHERE e.starts <> a.ends + (t.state = 'running')::int OR t.try_number <> e.starts""",
    "an event does not begin where the one before ended": """
        SELECT * FROM (SELECT id, ti_id, from_state, to_state, reason,
                 lag(to_state, 1, 'none') OVER (PARTITION BY ti_id ORDER BY id) AS before FROM ti_event) e
        WHERE e.from_state <> e.before""",
    "a task instance is not in the state of its last event": """
        SELECT t.id, t.task_id, t.state, e.to_state FROM task_instance t
        CROSS JOIN LATERAL (SELECT to_state FROM ti_event WHERE ti_id = t.id ORDER BY id DESC LIMIT 1) e
        WHERE t.state <> e.to_state""",
    "a task instance has moved without an event": """
        SELECT t.id, t.task_id, t.state FROM task_instance t
        WHERE t.state <> 'none' AND NOT EXISTS (SELECT 1 FROM ti_event WHERE ti_id = t.id)""",
    "two attempts of one task instance overlap": """
        SELECT a.ti_id, a.id, a.ended_at, b.id, b.started_at FROM attempt a JOIN attempt b
          ON b.ti_id = a.ti_id AND b.try_number > a.try_number AND b.started_at < a.ended_at""",
    "an attempt was started or ended more than once": """
        SELECT * FROM (
          SELECT attempt_id, count(*) FILTER (WHERE to_state = 'running') AS starts,
                 count(*) FILTER (WHERE from_state = 'running') AS ends
          FROM ti_event WHERE attempt_id IS NOT NULL GROUP BY attempt_id) e
        WHERE starts > 1 OR ends > 1""",
    "two attempts share a try number": """
        SELECT ti_id, try_number, count(*) FROM attempt GROUP BY 1, 2 HAVING count(*) > 1""",
    "an end was not accounted": "SELECT * FROM unaccounted",
    "a failed run has neither a failed task instance nor a cause": """
        SELECT r.id, r.run_id FROM dag_run r WHERE r.state = 'failed' AND r.cause IS NULL AND NOT EXISTS
          (SELECT 1 FROM task_instance WHERE run_pk = r.id AND state IN ('failed', 'upstream_failed'))""",
    "an ended attempt has no reason": "SELECT id FROM attempt WHERE reason IS NULL OR reason = ''",
}


def check_invariants(tx: Connection) -> None:
    """Assert what must hold in every database at rest, from rows alone."""
    broken = {name: rows for name, query in _INVARIANTS.items() if (rows := tx.execute(text(query)).all())}
    legal = {(str(one), str(other)) for one, others in LEGAL_TRANSITIONS.items() for other in others}
    steps = {tuple(row) for row in tx.execute(text("SELECT DISTINCT from_state, to_state FROM ti_event"))}
    if steps - legal:
        broken["an event shows an illegal transition"] = sorted(steps - legal)
    if failed_leaves := _failed_leaves_of_successful_runs(tx):
        broken["a run succeeded although a leaf failed"] = failed_leaves
    assert not broken, "\n".join(f"{name}: {[tuple(row) for row in rows][:10]}" for name, rows in broken.items())


def _failed_leaves_of_successful_runs(tx: Connection) -> list[Any]:
    from dflow.core import serialization
    from dflow.core.graph import Graph

    suspects = tx.execute(
        text(
            "SELECT r.id, r.run_id, t.task_id, v.spec FROM dag_run r JOIN task_instance t ON t.run_pk = r.id"
            " JOIN dag_version v ON v.id = r.dag_version_id"
            " WHERE r.state = 'success' AND t.state IN ('failed', 'upstream_failed')"
        )
    ).all()
    return [
        (row.id, row.run_id, row.task_id)
        for row in suspects
        if row.task_id in Graph(serialization.from_json(row.spec)).leaves
    ]

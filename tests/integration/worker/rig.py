"""A worker without a scheduler: rows made queued directly, nudges published, and a real ``celery -A worker worker``."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import text

from dflow.broker.publisher import Publisher
from dflow.core.messages import Nudge
from dflow.settings import Settings
from dflow.store import bundles, logs
from dflow.store.engine import Store
from tests.support import MARKER, eventually, marked_processes

HEADER = "import os, signal, subprocess, sys, time\nfrom dflow import DAG, task\n"


class WorkerRig:
    """Rows, messages and workers of one test."""

    def __init__(self, settings: Settings, store: Store, directory: Path) -> None:
        self.settings, self.store, self.directory = settings, store, directory
        self.token = uuid.uuid4().hex
        self.workers: list[subprocess.Popen[bytes]] = []
        self.publisher = Publisher(settings)
        self._run_pks: dict[str, int] = {}

    # Rows

    def dag(self, body: str, *, path: str = "d.py") -> int:
        """Store a DAG file whose DAG is ``d``, with a running run of it; returns the run's key.

        ``body`` is what stands inside ``with DAG("d"):``.
        """
        source = HEADER + 'with DAG("d", schedule=None):\n' + textwrap.indent(textwrap.dedent(body), "    ")
        return self.run({path: source}, path=path)

    def run(self, files: dict[str, str], *, path: str = "d.py", dag_id: str = "d") -> int:
        shas = {name: hashlib.sha256(source.encode()).hexdigest() for name, source in files.items()}
        with self.store.begin() as tx:
            bundles.put_blobs(tx, {shas[name]: source.encode() for name, source in files.items()})
            bundle_hash = bundles.put_bundle(tx, "dags", shas)
            return int(
                tx.execute(
                    text(
                        "INSERT INTO dag_run (dag_id, run_id, run_type, state, run_after, started_at, logical_date,"
                        " dag_version_id, bundle_hash, path, max_active_tasks, triggered_by) VALUES (:d, :r, 'manual',"
                        " 'running', now(), now(), now(), 1, :h, :p, 16, 'test') RETURNING id"
                    ),
                    {"d": dag_id, "r": uuid.uuid4().hex, "h": bundle_hash, "p": path},
                ).scalar_one()
            )

    def queue(self, run_pk: int, task_id: str = "t", *, retries: int = 0, queue: str = "default") -> Nudge:
        """Make a queued task instance as admission leaves it."""
        return self.queue_many(run_pk, [task_id], retries=retries, queue=queue)[0]

    def queue_many(
        self,
        run_pk: int,
        task_ids: Sequence[str],
        *,
        retries: int = 0,
        queue: str = "default",
        copies: int = 0,
        indexes: Sequence[int] = (),
    ) -> list[Nudge]:
        with self.store.begin() as tx:
            rows = tx.execute(
                text(
                    "INSERT INTO task_instance (run_pk, dag_id, task_id, map_index, state, pool, queue, attempt_id,"
                    " retries, queued_at) SELECT r.id, r.dag_id, t.task_id, m, 'queued', 'default_pool', :q,"
                    " gen_random_uuid(), :n, now() FROM dag_run r, unnest(CAST(:t AS text[])) AS t(task_id),"
                    " unnest(CAST(:m AS int[])) AS m WHERE r.id = :r"
                    " RETURNING id, CAST(attempt_id AS text) AS attempt_id, dag_id, task_id, map_index"
                ),
                {
                    "r": run_pk,
                    "t": list(task_ids),
                    "q": queue,
                    "n": retries,
                    "m": list(indexes) or list(range(copies)) or [-1],
                },
            ).all()
        return [
            Nudge(
                ti_id=row.id,
                attempt_id=row.attempt_id,
                dag_id=row.dag_id,
                task_id=row.task_id,
                run_id="r",
                map_index=row.map_index,
                queue=queue,
                priority_weight=1,
            )
            for row in rows
        ]

    def requeue(self, nudge: Nudge) -> Nudge:
        """Make a waiting task instance queued again, as retry and admission would."""
        attempt_id = str(uuid.uuid4())
        with self.store.begin() as tx:
            tx.execute(
                text("UPDATE task_instance SET state = 'scheduled' WHERE id = :i AND state <> 'scheduled'"),
                {"i": nudge.ti_id},
            )
            tx.execute(
                text("UPDATE task_instance SET state = 'queued', attempt_id = :a, queued_at = now() WHERE id = :i"),
                {"i": nudge.ti_id, "a": attempt_id},
            )
        return Nudge(
            **{**{name: getattr(nudge, name) for name in Nudge.__dataclass_fields__}, "attempt_id": attempt_id}
        )

    def publish(self, *nudges: Nudge) -> None:
        self.publisher.publish(nudges)
        self.execute(
            "UPDATE task_instance SET published_at = now(), publish_count = publish_count + 1 WHERE id = ANY(:i)",
            i=[nudge.ti_id for nudge in nudges],
        )

    def execute(self, query: str, **values: Any) -> None:
        with self.store.begin() as tx:
            tx.execute(text(query), values)

    def rows(self, query: str, **values: Any) -> Sequence[Any]:
        with self.store.begin() as tx:
            return tx.execute(text(query), values).all()

    def ti(self, nudge: Nudge) -> Any:
        return self.rows("SELECT * FROM task_instance WHERE id = :i", i=nudge.ti_id)[0]

    def attempt(self, nudge: Nudge) -> Any:
        return self.rows("SELECT * FROM attempt WHERE id = CAST(:i AS uuid)", i=nudge.attempt_id)[0]

    def wait(self, nudge: Nudge, *states: str, deadline_seconds: float = 30.0) -> Any:
        """Wait until the task instance is in one of the states; returns its row."""
        wanted = states or ("success",)

        def look() -> Any:
            row = self.ti(nudge)
            return row if row.state in wanted else None

        try:
            return eventually(look, deadline_seconds)
        except AssertionError:
            row = self.ti(nudge)
            raise AssertionError(f"{row.state} ({row.reason}: {row.cause}), not {wanted}\n{self.log()}") from None

    def lines(self, nudge: Nudge) -> list[tuple[str, str, str]]:
        """Return the stored log of the attempt: level, source, text."""
        with self.store.begin() as tx:
            chunks = logs.read(tx, nudge.attempt_id)
        return [(line.level, line.source, line.text) for chunk in chunks for line in chunk.lines]

    # Workers

    def worker(
        self, *arguments: str, concurrency: int = 2, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a worker and return when it holds a lease."""
        known = len(self.rows("SELECT id FROM worker WHERE state = 'live'"))
        process = self.start("worker", "-c", str(concurrency), "-n", f"w{len(self.workers)}@%h", *arguments, env=env)
        self.workers.append(process)

        def is_up() -> bool:
            assert process.poll() is None, self.log()
            return len(self.rows("SELECT id FROM worker WHERE state = 'live'")) > known

        eventually(is_up, 30)
        return process

    def environ(self) -> dict[str, str]:
        """The environment of what this rig starts."""
        return {**os.environ, **self.settings.as_env(), MARKER: self.token}

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start ``celery -A worker ARGUMENTS``; its output goes into the log."""
        with (self.directory / "worker.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environ(), **(env or {})},
                start_new_session=True,
                cwd=self.directory,
            )

    def celery(self, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a ``celery -A worker`` command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "celery", "-A", "worker", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environ(),
            cwd=self.directory,
            check=False,
        )

    def log(self) -> str:
        path = self.directory / "worker.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def agent(self, worker: subprocess.Popen[bytes]) -> psutil.Process:
        """The agent process of a worker."""
        for process in psutil.Process(worker.pid).children():
            if "dflow.runtime.agent" in process.cmdline():
                return process
        raise AssertionError("the worker has no agent")

    def wait_exit(self, process: subprocess.Popen[bytes], deadline_seconds: float = 30.0) -> int:
        """Return the exit code of a process that must end by itself."""
        try:
            return process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running\n{self.log()}") from None

    def stop(self) -> None:
        """End all workers as a user would; nothing may be left."""
        self.publisher.close()
        for process in self.workers:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        slow = []
        for process in self.workers:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                slow.append(process.pid)
                process.kill()
                process.wait(5)
        try:
            eventually(lambda: not marked_processes(self.token), 10)
        finally:
            left = marked_processes(self.token)
            for process in left:
                process.kill()
        assert not slow, f"a worker did not end within 20 s of SIGTERM\n{self.log()}"

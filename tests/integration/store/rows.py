"""Rows made directly, for tests of single statements: a DAG, a run and task instances in any state a test needs."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from sqlalchemy import Connection, text


@dataclass
class Rows:
    """Makes rows in one database; every method returns the id of what it made."""

    tx: Connection

    def dag(self, dag_id: str = "d", *, is_paused: bool = False) -> str:
        self.tx.execute(
            text("INSERT INTO dag (dag_id, bundle_name, path, is_paused) VALUES (:d, 'dags', 'd.py', :p)"),
            {"d": dag_id, "p": is_paused},
        )
        return dag_id

    def run(self, dag_id: str = "d", *, max_active_tasks: int = 16, age_seconds: int = 0) -> int:
        return self.tx.execute(
            text(
                "INSERT INTO dag_run (dag_id, run_id, run_type, state, run_after, dag_version_id, bundle_hash, path,"
                " max_active_tasks, triggered_by) VALUES (:d, :r, 'manual', 'running',"
                " now() - make_interval(secs => :age), 1, 'h', 'd.py', :m, 'test') RETURNING id"
            ),
            {"d": dag_id, "r": uuid.uuid4().hex, "m": max_active_tasks, "age": age_seconds},
        ).scalar_one()

    def tasks(
        self,
        run_pk: int,
        count: int = 1,
        *,
        state: str = "scheduled",
        pool: str = "default_pool",
        pool_slots: int = 1,
        queue: str = "default",
        priority: int = 1,
        executor: str | None = None,
    ) -> list[int]:
        rows = self.tx.execute(
            text(
                "INSERT INTO task_instance (run_pk, dag_id, task_id, state, pool, pool_slots, queue, priority_weight,"
                " executor, attempt_id) SELECT :r, 'd', gen_random_uuid()::text, :s, :p, :ps, :q, :w, :x,"
                " CASE WHEN :s IN ('queued', 'running') THEN gen_random_uuid() END"
                " FROM generate_series(1, :n) RETURNING id"
            ),
            {
                "r": run_pk, "s": state, "p": pool, "ps": pool_slots, "q": queue, "w": priority, "x": executor,
                "n": count,
            },
        )  # fmt: skip
        return [row.id for row in rows]

    def pool(self, name: str, slots: int) -> None:
        self.tx.execute(text("INSERT INTO pool (name, slots) VALUES (:n, :s)"), {"n": name, "s": slots})

    def worker(
        self, *queues: str, concurrency: int = 8, state: str = "live", lease: int = 60, executor: str = "CeleryExecutor"
    ) -> str:
        worker_id = str(uuid.uuid4())
        self.tx.execute(
            text(
                "INSERT INTO worker (id, name, hostname, pid, executor, queues, concurrency, state, lease_until,"
                " lease_seconds, version) VALUES (:i, 'w', 'h', 1, :x, :q, :c, :s,"
                " now() + make_interval(secs => :l), 30, '0')"
            ),
            {"i": worker_id, "x": executor, "q": list(queues), "c": concurrency, "s": state, "l": lease},
        )
        return worker_id

    def state(self, ti_id: int) -> str:
        return self.tx.execute(text("SELECT state FROM task_instance WHERE id = :i"), {"i": ti_id}).scalar_one()

    def states(self, run_pk: int) -> dict[str, int]:
        rows = self.tx.execute(
            text("SELECT state, count(*) AS n FROM task_instance WHERE run_pk = :r GROUP BY state"), {"r": run_pk}
        )
        return {row.state: row.n for row in rows}

    def count(self, table: str) -> int:
        return self.tx.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()

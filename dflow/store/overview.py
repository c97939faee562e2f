"""What is going on, in two small reads for people: recent runs with their states counted, and live workers.

Takes no locks. The cost follows the number of runs asked for and of their task instances, not the size of the history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

_RUNS = text(
    """
    SELECT r.dag_id, r.run_id, r.state, r.cause, r.started_at, r.ended_at, now() AS at,
           (SELECT jsonb_object_agg(state, n) FROM
              (SELECT state, count(*) AS n FROM task_instance WHERE run_pk = r.id GROUP BY state) s) AS counts
      FROM (SELECT * FROM dag_run ORDER BY run_after DESC LIMIT :limit) r
     ORDER BY r.run_after DESC
    """
)
_WORKERS = text(
    """
    SELECT w.name, w.hostname, w.state, w.executor, w.queues, w.concurrency,
           (SELECT count(*) FROM task_instance t WHERE t.worker_id = w.id AND t.state = 'running') AS running,
           w.lease_until < now() AS is_overdue
      FROM worker w WHERE w.state <> 'gone' ORDER BY w.name
    """
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One run: how far it is."""

    dag_id: str
    run_id: str
    state: str
    cause: str | None
    elapsed_seconds: float | None  # None: not started
    counts: Mapping[str, int]  # task instances by state


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """One worker that holds a lease."""

    name: str
    hostname: str
    state: str  # live, draining, or overdue when its lease has ended
    executor: str
    queues: tuple[str, ...]
    concurrency: int
    running: int  # attempts now


def recent_runs(tx: Connection, limit: int = 10) -> list[RunLine]:
    """Return the latest runs by `run_after`, latest first."""
    return [
        RunLine(
            dag_id=row.dag_id,
            run_id=row.run_id,
            state=row.state,
            cause=row.cause,
            elapsed_seconds=_elapsed(row.started_at, row.ended_at or row.at),
            counts=row.counts or {},
        )
        for row in tx.execute(_RUNS, {"limit": limit})
    ]


def live_workers(tx: Connection) -> list[WorkerLine]:
    """Return the workers that are not gone, by name."""
    return [
        WorkerLine(
            name=row.name,
            hostname=row.hostname,
            state="overdue" if row.is_overdue else row.state,
            executor=row.executor,
            queues=tuple(row.queues),
            concurrency=row.concurrency,
            running=row.running,
        )
        for row in tx.execute(_WORKERS)
    ]


def _elapsed(started_at: datetime | None, until: datetime) -> float | None:
    return None if started_at is None else (until - started_at).total_seconds()

"""Task instances as they are read: by people, by agents, and by the scheduler's timers.

Nothing here assigns a state; `dflow.store.apply` alone does. What is written here is when a message was published.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from dflow.core.errors import NotFoundError
from dflow.core.messages import Nudge
from dflow.core.states import TaskState
from dflow.store import runs
from dflow.store.prepared import Prepared
from dflow.store.rows import all_rows, columns, did_you_mean, first_row


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInstance:
    """One row of `task_instance`; ``map_index`` -1 for a task that is not mapped."""

    id: int
    run_pk: int
    dag_id: str
    task_id: str
    map_index: int
    state: str
    attempt_id: str | None
    try_number: int
    user_failures: int
    infra_failures: int
    retries: int
    pool: str
    pool_slots: int
    queue: str
    executor: str | None
    priority_weight: int
    not_before: datetime | None
    scheduled_at: datetime | None
    queued_at: datetime | None
    published_at: datetime | None
    publish_count: int
    worker_id: str | None
    hostname: str | None
    pid: int | None
    started_at: datetime | None
    ended_at: datetime | None
    cancel_requested_at: datetime | None
    cancelled_by: str | None
    reason: str | None
    cause: str | None
    note: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DueRetry:
    """A waiting task instance whose time has come, locked. ``is_cancelled``: its run is being stopped; do not retry."""

    ti_id: int
    run_pk: int
    dag_id: str
    task_id: str
    map_index: int
    state: TaskState
    attempt_id: str | None
    is_cancelled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """All an agent tells a task process about its attempt: the fields of `dflow.runtime.protocol.Work`."""

    ti_id: int
    attempt_id: str
    run_pk: int
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    try_number: int
    user_failures: int
    retries: int
    run_type: str
    logical_date: datetime | None
    data_interval_start: datetime | None
    data_interval_end: datetime | None
    run_after: datetime
    run_started_at: datetime | None
    conf: dict[str, Any]
    bundle_hash: str
    path: str
    queue: str
    pool: str
    priority_weight: int
    hostname: str
    started_at: datetime


def list_for_run(tx: Connection, run_pk: int) -> list[TaskInstance]:
    """Return the task instances of a run, by task id and map index. Locks nothing."""
    return all_rows(TaskInstance, tx.execute(_LIST_FOR_RUN, {"run_pk": run_pk}))


def get(tx: Connection, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> TaskInstance:
    """Return one task instance. Raises NotFoundError, naming the nearest DAG, run or task. Locks nothing."""
    run = runs.get(tx, dag_id, run_id)
    found = first_row(TaskInstance, tx.execute(_GET, {"run_pk": run.id, "task_id": task_id, "map_index": map_index}))
    if found is None:
        raise _not_found(tx, run, task_id, map_index)
    return found


def get_by_id(tx: Connection, ti_id: int) -> TaskInstance | None:
    """Return the task instance with a primary key, or None."""
    return first_row(TaskInstance, tx.execute(_GET_BY_ID, {"ti_id": ti_id}))


def describe_claimed(tx: Connection, ti_ids: Iterable[int]) -> list[Claimed]:
    """Return what the processes of running task instances need to know; not running ones are absent.

    Two index probes for each; meant to follow a batch of claims in the same transaction.
    """
    return all_rows(Claimed, _DESCRIBE_CLAIMED.execute(tx, {"ti_ids": list(ti_ids)}))


def states(tx: Connection, run_pk: int, task_ids: Sequence[str]) -> dict[str, str]:
    """Return the states of tasks of a run; of a mapped task, that of its instance with the lowest map index."""
    rows = tx.execute(_STATES, {"run_pk": run_pk, "task_ids": list(task_ids)})
    return {row.task_id: row.state for row in rows}


def due_retries(tx: Connection, limit: int) -> list[DueRetry]:
    """Lock (SKIP LOCKED) and return task instances that wait for a time (retry, reschedule) that has passed.

    Costs a scan of the partial index `ti_waiting` up to now: nothing when nothing is due.
    """
    return [
        DueRetry(
            ti_id=row.id,
            run_pk=row.run_pk,
            dag_id=row.dag_id,
            task_id=row.task_id,
            map_index=row.map_index,
            state=TaskState(row.state),
            attempt_id=row.attempt_id,
            is_cancelled=row.is_cancelled,
        )
        for row in tx.execute(_DUE_RETRIES, {"limit": limit})
    ]


def next_wakeup(tx: Connection) -> datetime | None:
    """Return when the scheduler next has something to do on its own (a retry, a due run, a run's timeout), or None.

    The instant may have passed. Three probes of partial indexes. Queued runs with a ``run_after`` in the future are not
    in it; the scheduler's poll finds those.
    """
    wakeup: datetime | None = tx.execute(_NEXT_WAKEUP).scalar_one()
    return wakeup


def unpublished(tx: Connection, after_seconds: float, limit: int, executor: str | None = None) -> list[Nudge]:
    """Lock (SKIP LOCKED) and return queued task instances nobody has claimed in time, to be published (again).

    In time is ``after_seconds`` after admission or the last publishing, doubled with each further publishing up to 32
    times: a message that waits in a long queue is not lost. ``executor`` leaves out tasks bound to another one. Costs a
    scan of the active task instances (index `ti_active`).
    """
    rows = tx.execute(_UNPUBLISHED, {"after_seconds": after_seconds, "limit": limit, "executor": executor})
    return all_rows(Nudge, rows)


def mark_published(tx: Connection, ti_ids: Iterable[int]) -> None:
    """Record that messages for queued task instances are published now; those no longer queued are left alone.

    One statement; locks the rows (SKIP LOCKED: one that is being claimed right now needs no mark, and the scheduler
    must not wait for a worker's commit).
    """
    tx.execute(_MARK_PUBLISHED, {"ti_ids": sorted(set(ti_ids))})


def active_counts(tx: Connection) -> dict[str, int]:
    """Return how many task instances of the whole system are in each state of motion. Reads partial indexes only."""
    return {row.state: row.total for row in tx.execute(_ACTIVE_COUNTS)}


def _not_found(tx: Connection, run: runs.Run, task_id: str, map_index: int) -> NotFoundError:
    known = {ti.task_id for ti in list_for_run(tx, run.id)}
    if task_id in known:
        return NotFoundError(f"The task {task_id!r} of run {run.run_id!r} has no instance with map index {map_index}.")
    hint = did_you_mean(task_id, known)
    return NotFoundError(
        f"The run {run.run_id!r} of {run.dag_id!r} has no task {task_id!r}.{hint} "
        f"`dflow tasks list {run.dag_id}` shows them."
    )


_COLUMNS = columns(
    "id run_pk dag_id task_id map_index state attempt_id::text try_number user_failures infra_failures retries pool "
    "pool_slots queue executor priority_weight not_before scheduled_at queued_at published_at publish_count "
    "worker_id::text hostname pid started_at ended_at cancel_requested_at cancelled_by reason cause note",
    "ti",
)

_LIST_FOR_RUN = text(
    f"SELECT {_COLUMNS} FROM task_instance ti WHERE ti.run_pk = :run_pk ORDER BY ti.task_id, ti.map_index"
)

_GET = text(f"""
    SELECT {_COLUMNS} FROM task_instance ti
    WHERE ti.run_pk = :run_pk AND ti.task_id = :task_id AND ti.map_index = :map_index""")

_GET_BY_ID = text(f"SELECT {_COLUMNS} FROM task_instance ti WHERE ti.id = :ti_id")

_DESCRIBE_CLAIMED = Prepared(
    """
    SELECT ti.id AS ti_id, CAST(ti.attempt_id AS text) AS attempt_id, ti.run_pk, ti.dag_id, r.run_id, ti.task_id,
           ti.map_index, ti.try_number, ti.user_failures, ti.retries, r.run_type, r.logical_date,
           r.data_interval_start, r.data_interval_end, r.run_after, r.started_at AS run_started_at, r.conf,
           r.bundle_hash, r.path, ti.queue, ti.pool, ti.priority_weight, ti.hostname, ti.started_at
    FROM task_instance ti JOIN dag_run r ON r.id = ti.run_pk
    WHERE ti.id = ANY(:ti_ids) AND ti.state = 'running' ORDER BY ti.id""",
    {"ti_ids": "bigint[]"},
)

_STATES = text("""
    SELECT DISTINCT ON (task_id) task_id, state FROM task_instance
    WHERE run_pk = :run_pk AND task_id = ANY(CAST(:task_ids AS text[])) ORDER BY task_id, map_index""")

_DUE_RETRIES = text("""
    SELECT ti.id, ti.run_pk, ti.dag_id, ti.task_id, ti.map_index, ti.state, CAST(ti.attempt_id AS text) AS attempt_id,
           EXISTS (SELECT 1 FROM dag_run r WHERE r.id = ti.run_pk AND r.cancel_requested_at IS NOT NULL) AS is_cancelled
    FROM task_instance ti
    WHERE ti.state IN ('up_for_retry', 'up_for_reschedule') AND ti.not_before <= now()
    ORDER BY ti.not_before LIMIT :limit FOR NO KEY UPDATE OF ti SKIP LOCKED""")

_NEXT_WAKEUP = text("""
    SELECT least(
        (SELECT min(not_before) FROM task_instance WHERE state IN ('up_for_retry', 'up_for_reschedule')),
        (SELECT min(next_run_after) FROM dag WHERE is_active AND NOT is_paused AND next_run_after IS NOT NULL),
        (SELECT min(timeout_at) FROM dag_run WHERE state = 'running' AND timeout_at IS NOT NULL))""")

_UNPUBLISHED = text("""
    SELECT ti.id AS ti_id, CAST(ti.attempt_id AS text) AS attempt_id, ti.dag_id, ti.task_id, r.run_id, ti.map_index,
           ti.queue, ti.priority_weight
    FROM task_instance ti JOIN dag_run r ON r.id = ti.run_pk
    WHERE ti.state IN ('queued', 'running') AND ti.state = 'queued'
      AND (CAST(:executor AS text) IS NULL OR ti.executor IS NULL OR ti.executor = :executor)
      AND coalesce(ti.published_at, ti.queued_at) < clock_timestamp() - make_interval(
          secs => :after_seconds * power(2, least(greatest(ti.publish_count - 1, 0), 5)))
    ORDER BY ti.priority_weight DESC, ti.id LIMIT :limit FOR NO KEY UPDATE OF ti SKIP LOCKED""")

_MARK_PUBLISHED = text("""
    WITH locked AS (
        SELECT id FROM task_instance WHERE id = ANY(CAST(:ti_ids AS bigint[])) AND state = 'queued'
        ORDER BY id FOR NO KEY UPDATE SKIP LOCKED)
    UPDATE task_instance ti SET published_at = clock_timestamp(), publish_count = ti.publish_count + 1
    FROM locked WHERE ti.id = locked.id AND ti.state = 'queued'""")

_ACTIVE_COUNTS = text("""
    SELECT state, count(*) AS total FROM task_instance WHERE state IN ('queued', 'running') GROUP BY state
    UNION ALL SELECT state, count(*) FROM task_instance WHERE state = 'scheduled' GROUP BY state
    UNION ALL SELECT state, count(*) FROM task_instance
              WHERE state IN ('up_for_retry', 'up_for_reschedule') GROUP BY state""")

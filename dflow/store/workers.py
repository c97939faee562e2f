"""Workers and their leases: one row for each incarnation of a worker, renewed by its agent.

A lease is judged by the database's clock alone. Whoever marks a worker `gone` has its row locked, and a renewal of a
worker that is gone fails, so an agent and the rescuer never both believe they own the same attempts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from dflow.core.errors import ConflictError
from dflow.store.rows import all_rows, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One row of `worker`; ``state`` is live, draining or gone."""

    id: str
    name: str
    hostname: str
    pid: int
    executor: str
    queues: list[str]
    concurrency: int
    state: str
    lease_until: datetime
    lease_seconds: float
    health_url: str | None
    version: str
    started_at: datetime
    ended_at: datetime | None
    cause: str | None
    claimed: int
    last_claim_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A worker with a valid lease and what it is busy with. ``free`` is never below zero."""

    worker: Worker
    running: int

    @property
    def free(self) -> int:
        """Slots that take another task now; none on a draining worker."""
        return max(0, self.worker.concurrency - self.running) if self.worker.state == "live" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """What an agent reports with a renewal: attempts claimed so far, and what it serves at the moment."""

    claimed: int = 0
    concurrency: int | None = None  # None: as registered
    queues: Sequence[str] | None = None


class RunningAttempt(NamedTuple):
    """An attempt the database holds this worker to be running."""

    ti_id: int
    attempt_id: str
    cancel_requested: bool
    cancelled_by: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewal:
    """The answer to a renewal. Not ``ok``: the lease is lost; end all children at once and register anew."""

    ok: bool
    state: str
    attempts: list[RunningAttempt]


@dataclass(frozen=True, slots=True, kw_only=True)
class LostAttempt:
    """A running task instance whose worker is gone; the budgets are what the rescuer decides by."""

    ti_id: int
    run_pk: int
    dag_id: str
    task_id: str
    map_index: int
    attempt_id: str
    infra_failures: int
    worker_id: str | None
    worker_name: str | None
    hostname: str | None
    cause: str | None  # why the worker is gone
    is_cancelled: bool  # somebody wanted it ended anyway


def register(
    tx: Connection,
    *,
    worker_id: str,
    name: str,
    hostname: str,
    pid: int,
    executor: str,
    queues: Sequence[str],
    concurrency: int,
    lease_seconds: float,
    version: str,
    health_url: str | None = None,
) -> Worker:
    """Announce a worker and give it its first lease; repeated, it updates the row and renews.

    Raises ConflictError when that incarnation is gone: register with a new id. Locks the row.
    """
    found = all_rows(
        Worker,
        tx.execute(
            _REGISTER,
            {
                "id": worker_id,
                "name": name,
                "hostname": hostname,
                "pid": pid,
                "executor": executor,
                "queues": list(queues),
                "concurrency": concurrency,
                "lease_seconds": lease_seconds,
                "health_url": health_url,
                "version": version,
            },
        ),
    )
    if not found:
        raise ConflictError(f"The worker {name} ({worker_id}) was declared gone; it must register with a new id.")
    return found[0]


def renew(tx: Connection, worker_id: str, lease_seconds: float, stats: WorkerStats | None = None) -> Renewal:
    """Renew a lease and return what the worker is held to be running, with cancellations.

    A lease that ended but that nobody has acted upon is renewed all the same; a worker that is gone (or unknown) is
    told so. One statement; locks the worker's row.
    """
    stats = stats or WorkerStats()
    rows = tx.execute(
        _RENEW,
        {
            "id": worker_id,
            "lease_seconds": lease_seconds,
            "claimed": stats.claimed,
            "concurrency": stats.concurrency,
            "queues": None if stats.queues is None else list(stats.queues),
        },
    ).all()
    attempts = [
        RunningAttempt(row.ti_id, row.attempt_id, row.cancel_requested, row.cancelled_by)
        for row in rows
        if row.ti_id is not None
    ]
    state = rows[0].state
    return Renewal(ok=state is not None, state=state or "gone", attempts=attempts)


def drain(tx: Connection, worker_id: str) -> bool:
    """Mark a live worker as draining: nothing more is admitted for it. Return whether it was live."""
    return tx.execute(_DRAIN, {"id": worker_id}).first() is not None


def deregister(tx: Connection, worker_id: str, cause: str = "shut down") -> bool:
    """Mark a worker as gone, in good order; return whether it was not gone before.

    Hand its attempts back first: whatever it still holds is then lost and rescued.
    """
    return tx.execute(_DEREGISTER, {"id": worker_id, "cause": cause}).first() is not None


def expire(tx: Connection, limit: int = 100) -> list[Worker]:
    """Mark workers whose lease has ended as gone and return them; their attempts are `lost_attempts`.

    Judged by the database's clock, and not before the database has been up for one full lease of the worker: no agent
    could renew while it was away. Locks the rows (SKIP LOCKED: one being renewed right now is not expired). Costs a
    scan of the partial index `worker_live` up to now.
    """
    return all_rows(Worker, tx.execute(_EXPIRE, {"limit": limit}))


def lost_attempts(tx: Connection, worker_ids: Iterable[str] | None = None) -> list[LostAttempt]:
    """Lock (SKIP LOCKED) and return running task instances whose worker is gone, of some workers or (None) of all.

    All of them costs a scan of the running task instances; it also finds those of a worker that left, or was declared
    gone by a rescuer that died before it rescued.
    """
    wanted = None if worker_ids is None else list(worker_ids)
    return all_rows(LostAttempt, tx.execute(_LOST_ATTEMPTS, {"worker_ids": wanted}))


def list_live(tx: Connection, executor: str | None = None) -> list[Capacity]:
    """Return the workers with a valid lease, by name, with how many attempts each runs. One statement, no locks."""
    found = []
    for row in tx.execute(_LIST_LIVE, {"executor": executor}).mappings():
        fields = dict(row)
        running = fields.pop("running")
        found.append(Capacity(worker=Worker(**fields), running=running))
    return found


def list_(tx: Connection, *, include_gone: bool = False, limit: int = 200) -> list[Worker]:
    """Return workers, newest first; those that are gone on request. Locks nothing."""
    return all_rows(Worker, tx.execute(_LIST, {"include_gone": include_gone, "limit": limit}))


def prune(tx: Connection, older_than_seconds: float) -> int:
    """Delete workers that have been gone for so long and that no running task instance names; return how many."""
    return tx.execute(_PRUNE, {"older_than_seconds": older_than_seconds}).rowcount


_COLUMNS = columns(
    "id::text name hostname pid executor queues concurrency state lease_until lease_seconds health_url version "
    "started_at ended_at cause claimed last_claim_at",
    "w",
)

_REGISTER = text(f"""
    INSERT INTO worker AS w (id, name, hostname, pid, executor, queues, concurrency, state, lease_until, lease_seconds,
                             health_url, version)
    VALUES (CAST(:id AS uuid), :name, :hostname, :pid, :executor, CAST(:queues AS text[]), :concurrency, 'live',
            clock_timestamp() + make_interval(secs => :lease_seconds), :lease_seconds, :health_url, :version)
    ON CONFLICT (id) DO UPDATE SET name = excluded.name, hostname = excluded.hostname, pid = excluded.pid,
        executor = excluded.executor, queues = excluded.queues, concurrency = excluded.concurrency,
        lease_until = excluded.lease_until, lease_seconds = excluded.lease_seconds,
        health_url = excluded.health_url, version = excluded.version
        WHERE w.state <> 'gone'
    RETURNING {_COLUMNS}""")

_RENEW = text("""
    WITH renewed AS (
        UPDATE worker SET lease_until = clock_timestamp() + make_interval(secs => :lease_seconds),
            lease_seconds = :lease_seconds,
            last_claim_at = CASE WHEN :claimed > claimed THEN clock_timestamp() ELSE last_claim_at END,
            claimed = greatest(claimed, :claimed),
            concurrency = coalesce(CAST(:concurrency AS integer), concurrency),
            queues = coalesce(CAST(:queues AS text[]), queues)
        WHERE id = CAST(:id AS uuid) AND state <> 'gone'
        RETURNING state
    )
    SELECT (SELECT state FROM renewed) AS state, ti.id AS ti_id, CAST(ti.attempt_id AS text) AS attempt_id,
           ti.cancel_requested_at IS NOT NULL AS cancel_requested, ti.cancelled_by
    FROM (VALUES (1)) AS always LEFT JOIN task_instance ti
        ON ti.worker_id = CAST(:id AS uuid) AND ti.state = 'running'""")

_DRAIN = text("""
    UPDATE worker SET state = 'draining' WHERE id = CAST(:id AS uuid) AND state = 'live' RETURNING id""")

_DEREGISTER = text("""
    UPDATE worker SET state = 'gone', ended_at = clock_timestamp(), cause = :cause
    WHERE id = CAST(:id AS uuid) AND state <> 'gone' RETURNING id""")

_EXPIRE = text(f"""
    WITH expired AS MATERIALIZED (
        SELECT id FROM worker
        WHERE state <> 'gone' AND lease_until < clock_timestamp()
          AND clock_timestamp() > pg_postmaster_start_time() + make_interval(secs => lease_seconds)
        ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
    )
    UPDATE worker w SET state = 'gone', ended_at = clock_timestamp(),
        cause = 'lease ended at ' || to_char(w.lease_until, 'YYYY-MM-DD"T"HH24:MI:SS"Z"') || ' without a renewal'
    FROM expired WHERE w.id = expired.id RETURNING {_COLUMNS}""")

_LOST_ATTEMPTS = text("""
    SELECT ti.id AS ti_id, ti.run_pk, ti.dag_id, ti.task_id, ti.map_index, CAST(ti.attempt_id AS text) AS attempt_id,
           ti.infra_failures, CAST(ti.worker_id AS text) AS worker_id, w.name AS worker_name, ti.hostname, w.cause,
           ti.cancel_requested_at IS NOT NULL AS is_cancelled
    FROM task_instance ti LEFT JOIN worker w ON w.id = ti.worker_id
    WHERE ti.state = 'running' AND (w.id IS NULL OR w.state = 'gone')
      AND (CAST(:worker_ids AS uuid[]) IS NULL OR ti.worker_id = ANY(CAST(:worker_ids AS uuid[])))
    ORDER BY ti.id FOR NO KEY UPDATE OF ti SKIP LOCKED""")

_LIST_LIVE = text(f"""
    SELECT {_COLUMNS},
           (SELECT count(*) FROM task_instance ti WHERE ti.worker_id = w.id AND ti.state = 'running') AS running
    FROM worker w
    WHERE w.state <> 'gone' AND w.lease_until > clock_timestamp()
      AND (CAST(:executor AS text) IS NULL OR w.executor = :executor)
    ORDER BY w.name, w.id""")

_LIST = text(f"""
    SELECT {_COLUMNS} FROM worker w WHERE w.state <> 'gone' OR :include_gone
    ORDER BY w.started_at DESC, w.id LIMIT :limit""")

_PRUNE = text("""
    DELETE FROM worker w
    WHERE w.state = 'gone' AND w.ended_at < now() - make_interval(secs => :older_than_seconds)
      AND NOT EXISTS (SELECT 1 FROM task_instance ti WHERE ti.worker_id = w.id AND ti.state = 'running')""")

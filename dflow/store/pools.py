"""Pools: named limits on slots. What is taken is always counted from task instances; there is no counter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from dflow.core.errors import ConflictError, NotFoundError
from dflow.store.rows import all_rows, did_you_mean, first_row

DEFAULT_POOL: Final = "default_pool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One row of `pool`; ``slots`` -1: no limit."""

    name: str
    slots: int
    description: str
    include_deferred: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUsage:
    """The slots of a pool taken by state, and those waiting. ``open`` None: the pool has no limit."""

    name: str
    slots: int
    running: int
    queued: int
    scheduled: int
    deferred: int
    open: int | None


def list_(tx: Connection) -> list[Pool]:
    """Return all pools by name."""
    return all_rows(Pool, tx.execute(_LIST))


def get(tx: Connection, name: str) -> Pool:
    """Return one pool. Raises NotFoundError, with the nearest name."""
    pool = first_row(Pool, tx.execute(_GET, {"name": name}))
    if pool is None:
        hint = did_you_mean(name, [known.name for known in list_(tx)])
        raise NotFoundError(f"There is no pool {name!r}.{hint} `dflow pools list` shows all.")
    return pool


def set_(
    tx: Connection, *, name: str, slots: int, description: str | None = None, include_deferred: bool | None = None
) -> Pool:
    """Create a pool or change it; None leaves description or include_deferred as they are. Locks the row.

    ``slots`` -1 means no limit. Fewer slots than are taken end nothing; nothing more is admitted until enough are free.
    Raises ConflictError for fewer than -1.
    """
    if slots < -1:
        raise ConflictError(f"A pool cannot have {slots} slots; give 0 or more, or -1 for no limit.")
    values = {"name": name, "slots": slots, "description": description, "include_deferred": include_deferred}
    return all_rows(Pool, tx.execute(_SET, values))[0]


def delete(tx: Connection, name: str) -> None:
    """Delete a pool. Raises NotFoundError, and ConflictError for the default pool or one in use.

    Task instances created later that name it wait until it exists again.
    """
    pool = get(tx, name)
    if name == DEFAULT_POOL:
        raise ConflictError(f"The pool {DEFAULT_POOL!r} cannot be deleted; set its slots instead.")
    used = next(usage for usage in usage_of_all(tx) if usage.name == name)
    if busy := used.running + used.queued + used.scheduled + used.deferred:
        raise ConflictError(f"The pool {name!r} is in use ({busy} slots taken or wanted); wait, or cancel those runs.")
    tx.execute(_DELETE, {"name": pool.name})


def usage(tx: Connection, name: str) -> PoolUsage:
    """Return what of a pool is taken. Raises NotFoundError."""
    get(tx, name)
    return next(one for one in usage_of_all(tx) if one.name == name)


def usage_of_all(tx: Connection) -> list[PoolUsage]:
    """Return what of each pool is taken, by name. Scans the task instances in motion, by partial indexes."""
    return all_rows(PoolUsage, tx.execute(_USAGE))


_LIST = text("SELECT name, slots, description, include_deferred FROM pool ORDER BY name")
_GET = text("SELECT name, slots, description, include_deferred FROM pool WHERE name = :name")

_SET = text("""
    INSERT INTO pool AS p (name, slots, description, include_deferred)
    VALUES (:name, :slots, coalesce(CAST(:description AS text), ''),
            coalesce(CAST(:include_deferred AS boolean), false))
    ON CONFLICT (name) DO UPDATE SET slots = excluded.slots,
        description = coalesce(CAST(:description AS text), p.description),
        include_deferred = coalesce(CAST(:include_deferred AS boolean), p.include_deferred)
    RETURNING name, slots, description, include_deferred""")

_DELETE = text("DELETE FROM pool WHERE name = :name")

_USAGE = text("""
    WITH taken AS (
        SELECT pool, state, sum(pool_slots) AS slots FROM task_instance WHERE state IN ('queued', 'running')
        GROUP BY pool, state
        UNION ALL
        SELECT pool, state, sum(pool_slots) FROM task_instance WHERE state = 'scheduled' GROUP BY pool, state
    ), by_pool AS (
        SELECT pool, coalesce(sum(slots) FILTER (WHERE state = 'running'), 0)::bigint AS running,
               coalesce(sum(slots) FILTER (WHERE state = 'queued'), 0)::bigint AS queued,
               coalesce(sum(slots) FILTER (WHERE state = 'scheduled'), 0)::bigint AS scheduled
        FROM taken GROUP BY pool
    )
    SELECT p.name, p.slots, coalesce(t.running, 0) AS running, coalesce(t.queued, 0) AS queued,
           coalesce(t.scheduled, 0) AS scheduled, 0 AS deferred,
           CASE WHEN p.slots >= 0 THEN greatest(0, p.slots - coalesce(t.running, 0) - coalesce(t.queued, 0)) END AS open
    FROM pool p LEFT JOIN by_pool t ON t.pool = p.name ORDER BY p.name""")

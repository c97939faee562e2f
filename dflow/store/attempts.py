"""Attempts: the tries of a task instance.

Those that have ended have a row each, written by `dflow.store.apply`; the one that runs is on the task instance itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from dflow.core.errors import NotFoundError
from dflow.store.rows import all_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try. ``ended_at`` None: it runs. ``exit_code`` is negative for a signal."""

    id: str
    ti_id: int
    run_pk: int
    try_number: int
    state: str
    reason: str | None
    cause: str | None
    exit_code: int | None
    peak_rss_bytes: int | None
    worker_id: str | None
    hostname: str | None
    pid: int | None
    queued_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None


def list_for_ti(tx: Connection, ti_id: int) -> list[Attempt]:
    """Return all tries of a task instance, the running one too, by try number. Two index probes."""
    return all_rows(Attempt, tx.execute(_LIST_FOR_TI, {"ti_id": ti_id}))


def get(tx: Connection, ti_id: int, try_number: int) -> Attempt:
    """Return one try. Raises NotFoundError, saying which there are."""
    tries = list_for_ti(tx, ti_id)
    for attempt in tries:
        if attempt.try_number == try_number:
            return attempt
    known = ", ".join(str(attempt.try_number) for attempt in tries) or "none so far"
    raise NotFoundError(f"The task instance has no try {try_number}; tries: {known}.")


def latest(tx: Connection, ti_id: int) -> Attempt | None:
    """Return the newest try of a task instance, or None when it has never started."""
    tries = list_for_ti(tx, ti_id)
    return tries[-1] if tries else None


_LIST_FOR_TI = text("""
    SELECT CAST(id AS text) AS id, ti_id, run_pk, try_number, state, reason, cause, exit_code, peak_rss_bytes,
           CAST(worker_id AS text) AS worker_id, hostname, pid, queued_at, started_at, ended_at
    FROM attempt WHERE ti_id = :ti_id
    UNION ALL
    SELECT CAST(attempt_id AS text), id, run_pk, try_number, state, reason, cause, NULL, NULL,
           CAST(worker_id AS text), hostname, pid, queued_at, started_at, NULL
    FROM task_instance WHERE id = :ti_id AND state = 'running'
    ORDER BY try_number, ended_at""")

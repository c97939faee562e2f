"""The history of task instances: one row for each change of state, written by `dflow.store.apply` alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from dflow.store.rows import all_rows, columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One row of `ti_event`; ``actor`` and ``cause`` are for people."""

    id: int
    ti_id: int
    run_pk: int
    attempt_id: str | None
    from_state: str
    to_state: str
    reason: str
    actor: str
    cause: str | None
    at: datetime


def list_for_ti(tx: Connection, ti_id: int) -> list[Event]:
    """Return the events of a task instance as they happened. One index range."""
    return all_rows(Event, tx.execute(_LIST_FOR_TI, {"ti_id": ti_id}))


def list_for_run(tx: Connection, run_pk: int, *, after_id: int = 0, limit: int = 1000) -> list[Event]:
    """Return events of a run as they happened, from after event ``after_id`` on. Probes an index for each instance."""
    return all_rows(Event, tx.execute(_LIST_FOR_RUN, {"run_pk": run_pk, "after_id": after_id, "limit": limit}))


_COLUMNS = columns("id ti_id run_pk attempt_id::text from_state to_state reason actor cause at", "e")

_LIST_FOR_TI = text(f"SELECT {_COLUMNS} FROM ti_event e WHERE e.ti_id = :ti_id ORDER BY e.id")

_LIST_FOR_RUN = text(f"""
    SELECT {_COLUMNS} FROM task_instance ti JOIN ti_event e ON e.ti_id = ti.id
    WHERE ti.run_pk = :run_pk AND e.id > :after_id ORDER BY e.id LIMIT :limit""")

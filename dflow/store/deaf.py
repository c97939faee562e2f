"""Is there work a worker should have taken? What an agent asks to find out that its worker no longer consumes."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text


def has_waiting(tx: Connection, *, executor: str, queues: Sequence[str], after_seconds: float) -> bool:
    """Return whether a task instance for these queues has waited unclaimed for so long although it was published.

    Being published again (which sets ``published_at`` anew) does not start the wait over; one whose first message was
    sent a moment ago, after a long outage of the broker, has not waited. "*" in ``queues`` stands for every queue.
    Costs a scan of the active task instances (index `ti_active`); locks nothing.
    """
    parameters = {"executor": executor, "queues": list(queues), "seconds": after_seconds}
    return bool(tx.execute(_HAS_WAITING, parameters).scalar_one())


_HAS_WAITING = text("""
    SELECT EXISTS (
        SELECT 1 FROM task_instance ti
        WHERE ti.state IN ('queued', 'running') AND ti.state = 'queued'
          AND ti.queued_at < clock_timestamp() - make_interval(secs => :seconds)
          AND (ti.published_at < clock_timestamp() - make_interval(secs => :seconds) OR ti.publish_count > 1)
          AND (ti.queue = ANY(CAST(:queues AS text[])) OR '*' = ANY(CAST(:queues AS text[])))
          AND (ti.executor IS NULL OR ti.executor = :executor))""")

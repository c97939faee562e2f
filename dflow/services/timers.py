"""Delays that have passed: `up_for_retry` and `up_for_reschedule` go back to `scheduled`.

A delay is an instant in a row, nothing in the broker and nothing in memory. This looks at most once per poll interval,
and at the instant the next delay ends; judged by the database's clock.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Final

from dflow.core.states import Reason, TaskState
from dflow.store import tasks
from dflow.store.apply import Change, apply
from dflow.store.engine import Tx

_BATCH: Final = 500
_REASONS: Final = {
    TaskState.UP_FOR_RETRY: Reason.RETRY_DUE,
    TaskState.UP_FOR_RESCHEDULE: Reason.RESCHEDULE_DUE,
}


class Timers:
    """Fires due delays inside the scheduler's transaction."""

    def __init__(self, actor: str, *, poll_interval_seconds: float) -> None:
        self._actor = actor
        self._poll_interval = poll_interval_seconds
        self._due_at = 0.0  # monotonic

    def seconds_left(self) -> float:
        """Return how long nothing needs to be looked at."""
        return max(0.0, self._due_at - time.monotonic())

    def fire(self, tx: Tx) -> int:
        """Schedule what is due; return how many. Free while nothing can be due."""
        if self.seconds_left() > 0:
            return 0
        due = tasks.due_retries(tx, _BATCH)
        fired = apply(tx, [self._change(row) for row in due])
        self._due_at = time.monotonic() + (0.0 if len(due) == _BATCH else self._until_next(tx))
        return len(fired)

    def _until_next(self, tx: Tx) -> float:
        """Seconds to the next delay that ends, if that is sooner than the poll.

        An instant that has passed is somebody else's to act upon (a due run, a timeout): waking for it would spin.
        """
        next_at = tasks.next_wakeup(tx)
        left = self._poll_interval if next_at is None else (next_at - datetime.now(UTC)).total_seconds()
        return left if 0 < left < self._poll_interval else self._poll_interval

    def _change(self, row: tasks.DueRetry) -> Change:
        if row.is_cancelled:
            to_state, reason, cause = TaskState.FAILED, Reason.CANCELLED, "its run was stopped; not tried again"
        else:
            to_state, reason, cause = TaskState.SCHEDULED, _REASONS[row.state], None
        return Change(
            ti_id=row.ti_id,
            from_state=row.state,
            to_state=to_state,
            reason=reason,
            attempt_id=row.attempt_id,
            actor=self._actor,
            cause=cause,
        )

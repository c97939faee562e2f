"""Publishes nudges after the commit, writes down which were, and finds those that seem lost.

A publish may fail, or nobody may know whether it happened, or Redis may lose what it had: rows that stay `queued`
without a claim for `scheduler.republish_after` seconds are published again, with a growing pause (doubling up to 32
times), and only while a live worker has a free slot for them: a message that waits behind long tasks is not lost.

That a message was published is written down a moment later, in the transaction of a later pass: most rows have been
claimed by then and need no write at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

from dflow.core.errors import PublishError
from dflow.core.messages import Nudge
from dflow.executors.base import Executor
from dflow.services.throughput import ANY_QUEUE
from dflow.store import tasks, workers
from dflow.store.engine import Tx

log = logging.getLogger(__name__)

_WRITE_DOWN_AFTER_SECONDS: Final = 0.25
_QUIET_SECONDS: Final = 2.0  # after a failure: planning goes on, and does not wait for the broker's timeout each pass


class Publishing:
    """The scheduler's way to its executor. One thread."""

    def __init__(self, executor: Executor, *, republish_after_seconds: float) -> None:
        self._executor = executor
        self._republish_after = republish_after_seconds
        self._published: list[int] = []
        self._writing: list[int] = []
        self._due_at = 0.0
        self._is_failing = False
        self._quiet_until = 0.0

    def publish(self, nudges: Sequence[Nudge], *, again: Sequence[Nudge] = ()) -> None:
        """Publish newly admitted nudges, and some ``again``. Never raises PublishError: the rows are found again."""
        both = [*again, *nudges]
        if not both or time.monotonic() < self._quiet_until:
            return
        try:
            self._executor.publish(both)
        except PublishError as error:
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            if not self._is_failing:
                self._is_failing = True
                log.warning("%s", error)
            return
        if self._is_failing:
            self._is_failing = False
            log.info("publishing works again")
        if again:
            log.info("published %d messages again that nobody had claimed", len(again))
        if not self._published:
            self._due_at = time.monotonic() + _WRITE_DOWN_AFTER_SECONDS
        self._published.extend(nudge.ti_id for nudge in both)

    def write_down(self, tx: Tx) -> None:
        """Record what was published a moment ago; nothing until then."""
        if self._published and time.monotonic() >= self._due_at:
            self.write_down_all(tx)

    def write_down_all(self, tx: Tx) -> None:
        """Record all that was published."""
        if self._published:
            tasks.mark_published(tx, self._published)
            self._writing = self._published

    def committed(self) -> None:
        """The transaction that wrote it down has committed."""
        if self._writing:
            self._published, self._writing = [], []

    def lost(self, tx: Tx, limit: int) -> list[Nudge]:
        """Return, locked, the nudges nobody has claimed in time and that a free worker waits for."""
        late = tasks.unpublished(tx, self._republish_after, limit, executor=self._executor.name)
        if not late:
            return []
        free = {
            queue
            for capacity in workers.list_live(tx, self._executor.name)
            if capacity.free > 0
            for queue in capacity.worker.queues
        }
        return [nudge for nudge in late if nudge.queue in free or ANY_QUEUE in free]

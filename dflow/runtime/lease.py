"""The worker's lease as its own machine sees it, and the thread that ends the tasks before it ends.

The database judges a lease by its clock from the moment it got the renewal; this side counts from the moment it *sent*
it, and stops a margin earlier, so it always believes the lease to be shorter than it is. The clock goes on while the
machine sleeps (CLOCK_BOOTTIME, where there is one).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

RENEWALS: Final = 4  # in one lease
_CHECK_SECONDS: Final = 0.25


def boot_seconds() -> float:
    """Return seconds on a clock that neither jumps nor stops."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Lease:
    """When it must be renewed and when it counts as over. Written by the loop, read by the watchdog."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.interval = seconds / RENEWALS
        self._margin = min(max(seconds / 8, 0.5), seconds / 4)
        self.due_at = 0.0
        self.ends_at = 0.0

    def renewed(self, sent_at: float) -> None:
        """A renewal sent then was confirmed."""
        self.due_at = sent_at + self.interval
        self.ends_at = sent_at + self.seconds - self._margin

    def is_due(self) -> bool:
        """Is it time for the next renewal?"""
        return boot_seconds() >= self.due_at

    def is_over(self) -> bool:
        """Must everything that relies on it have stopped?"""
        return boot_seconds() >= self.ends_at


class Watchdog:
    """Calls ``fence`` from a thread of its own when the lease is over while attempts run, whatever the loop is doing.

    ``fence`` must end the tasks; afterwards the process ends at once with ``exit_code``.
    """

    def __init__(
        self, lease: Lease, *, has_work: Callable[[], bool], fence: Callable[[], None], exit_code: int
    ) -> None:
        self._lease = lease
        self._has_work = has_work
        self._fence = fence
        self._exit_code = exit_code
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="dflow-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Nothing is left to guard."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(_CHECK_SECONDS):
            if self._lease.is_over() and self._has_work():
                log.critical("the lease could not be renewed in time; ending all tasks and this worker")
                self._fence()
                logging.shutdown()
                os._exit(self._exit_code)

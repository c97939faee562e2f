"""The attempts a worker machine runs, and what its agent does to their processes.

Kills what is cancelled, overruns its limit, has to go with the worker or is no longer ours, with everything it started;
learns how a process ended; says which ends are to be recorded. Records nothing itself.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from dflow.runtime.ends import EndKind
from dflow.runtime.live import Live, Request
from dflow.runtime.processes import OomCounter
from dflow.runtime.protocol import ATTEMPT_VARIABLE

log = logging.getLogger(__name__)

_CLOSING_SECONDS: Final = 0.2  # between a process closing its descriptors and its end
_SAMPLE_SECONDS: Final = 1.0
_STATUS_WAIT_SECONDS: Final = 3.0  # how long a parent may take to say how its child ended
_EXIT_KEPT_SECONDS: Final = 10.0


class Exit(NamedTuple):
    """How a child ended, and when we heard."""

    code: int | None
    at: float


class Wards:
    """The running attempts by attempt id. `fence` alone may be called from another thread.

    ``kill_grace`` is seconds between asking a task to stop and killing it. ``ask_how_ended(pid)`` asks the parent for
    an exit status, which arrives by `note_exit`.
    """

    def __init__(self, *, kill_grace: float, ask_how_ended: Callable[[int], None]) -> None:
        self.live: dict[str, Live] = {}
        self._kill_grace = kill_grace
        self._ask_how_ended = ask_how_ended
        self._exits: dict[int, Exit] = {}  # by pid
        self._oom = OomCounter()
        self._next_sample_at = 0.0

    def add(self, live: Live) -> None:
        """An attempt was claimed."""
        self._exits.pop(live.process.pid, None)
        self.live[live.attempt_id] = live

    def forget(self, live: Live) -> None:
        """Its end is recorded, or is not ours to record."""
        self.live.pop(live.attempt_id, None)

    def note_exit(self, pid: int, exit_code: int | None) -> None:
        """The parent says how a child ended. Kept for a moment only: a pid names another process soon enough."""
        now = time.monotonic()
        self._exits = {one: exit for one, exit in self._exits.items() if exit.at > now - _EXIT_KEPT_SECONDS}
        self._exits[pid] = Exit(exit_code, now)

    def lost(self, live: Live) -> None:
        """The connection to the process of an attempt is gone. Make sure that the process is, and find out how."""
        if live.died_at is not None:
            return
        live.died_at = time.monotonic()
        if live.is_ending:
            return
        process = live.process
        if process.is_alive() and not process.wait_gone(_CLOSING_SECONDS):
            # A task may close descriptors that are not its own. Without a connection it cannot be told anything.
            process.kill_tree(_mark(live))
            process.wait_gone(_CLOSING_SECONDS)
        self._ask_how_ended(process.pid)

    def limit(self, live: Live, timeout_seconds: float | None) -> None:
        """The process said how long it may run; it ends itself then, or is killed after the grace."""
        live.timeout_seconds = timeout_seconds
        if timeout_seconds is not None:
            live.kill_at = time.monotonic() + timeout_seconds + self._kill_grace

    def cancel(self, live: Live, by: str | None) -> None:
        """Ask the task to stop; it is killed after the grace."""
        live.cancelled_by = by or "unknown"
        live.kind = live.kind or EndKind.CANCEL
        log.info("cancelling attempt %s of %s for %s", live.attempt_id, live.name, live.cancelled_by)
        live.process.signal(signal.SIGUSR1)
        live.kill_at = time.monotonic() + self._kill_grace

    def kill(self, live: Live, kind: EndKind) -> None:
        """Kill the process and what it started. What was said first about why stays, unless it is no longer ours."""
        # Also of one that is dead already: a worker's children die with it, and may be seen to before it is.
        live.kind = kind if kind is EndKind.NOT_OURS else live.kind or kind
        live.kill_at = None
        if live.is_killed:
            return
        live.is_killed = True
        live.process.kill_tree(_mark(live))

    def kill_all(self, kind: EndKind) -> None:
        """Kill every attempt whose end is not on its way yet."""
        for live in list(self.live.values()):
            if not live.is_ending:
                self.kill(live, kind)

    def fence(self) -> None:
        """In the watchdog's thread: end every task at once, for the lease is over."""
        lives = list(self.live.values())
        for live in lives:
            live.process.signal(signal.SIGKILL)  # every task first; what they started takes longer to find
        for live in lives:
            live.process.kill_tree(_mark(live))
        for live in lives:
            live.process.wait_gone(1.0)

    def look_after(self, drain_at: float | None) -> list[Request]:
        """Act on what time or the system has done, and return the ends to be recorded.

        ``drain_at`` (monotonic) is when attempts that still run are killed and handed back.
        """
        now = time.monotonic()
        self._sample(now)
        ends = []
        for live in list(self.live.values()):
            if live.is_ending:
                continue
            if live.died_at is not None:
                if (end := self._end_of_dead(live, now)) is not None:
                    ends.append(end)
            elif drain_at is not None and now >= drain_at:
                self.kill(live, EndKind.DRAIN)
            elif live.kill_at is not None and now >= live.kill_at:
                self.kill(live, EndKind.TIMEOUT)
        return ends

    def instants(self, drain_at: float | None) -> Iterator[float]:
        """When (monotonic) `look_after` has something to do, if nothing else happens before."""
        if self.live:
            yield self._next_sample_at
        for live in self.live.values():
            if live.is_ending:
                continue
            if live.died_at is not None:
                yield live.died_at + (0.0 if self._is_known(live) else _STATUS_WAIT_SECONDS)
            elif not live.is_killed:
                if live.kill_at is not None:
                    yield live.kill_at
                if drain_at is not None:
                    yield drain_at

    def _end_of_dead(self, live: Live, now: float) -> Request | None:
        """Its process is gone without a word. The parent says how; what we did to it ourselves we know."""
        assert live.died_at is not None
        if not live.is_killed:
            # What it left behind; also, a process it forked keeps its parent from noticing its death.
            live.is_killed = True
            live.process.kill_tree(_mark(live))
        if not self._is_known(live) and now < live.died_at + _STATUS_WAIT_SECONDS:
            return None
        known = self._exits.get(live.process.pid)
        exit_code = known.code if known is not None else None
        is_out_of_memory = exit_code in (None, -signal.SIGKILL) and live.kind is None and self._oom.has_risen()
        live.is_ending = True
        return Request(op="died", message={}, live=live, exit_code=exit_code, is_out_of_memory=is_out_of_memory)

    def _is_known(self, live: Live) -> bool:
        return live.kind is not None or live.process.pid in self._exits

    def _sample(self, now: float) -> None:
        """Remember the peak memory of running tasks; after an end by SIGKILL nobody else knows."""
        if now < self._next_sample_at:
            return
        self._next_sample_at = now + _SAMPLE_SECONDS
        for live in self.live.values():
            if live.died_at is None and now - live.claimed_at >= _SAMPLE_SECONDS / 2:
                live.peak_rss_bytes = live.process.peak_rss_bytes() or live.peak_rss_bytes


def _mark(live: Live) -> str:
    return f"{ATTEMPT_VARIABLE}={live.attempt_id}"

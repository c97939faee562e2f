"""The loop every service runs in: one pass after the other until asked to stop, whatever happens in between.

A service is a name and ``run_once() -> counts``. The loop around it promises:

- it never ends because Postgres or Redis is away: the failure is logged once, passes are retried with a growing pause,
  and the return is logged too;
- liveness is progress: the heartbeat row and `/readyz` follow *finished* passes, nothing else;
- a pass that hangs for ``stall_after_seconds`` ends the process with exit code 70 (EX_SOFTWARE) after every thread's
  stack was written to stderr, so that a supervisor starts it anew: every state is in a row, nothing is lost;
- SIGTERM and SIGINT let the current pass finish.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from dflow.core.errors import BrokerUnavailableError, PublishError, StoreUnavailableError
from dflow.services.health import Health

log = logging.getLogger(__name__)

Counts = Mapping[str, int]  # what a pass did: {"planned": 3, "admitted": 2}

STALLED_EXIT_CODE: Final = 70
_FIRST_PAUSE_SECONDS: Final = 0.2
_LONGEST_PAUSE_SECONDS: Final = 5.0
_OUTAGES: Final = (StoreUnavailableError, BrokerUnavailableError, PublishError)


class Service(Protocol):
    """One idea run again and again."""

    name: str

    def run_once(self) -> Counts:
        """Do what is due now and return what was done; raise when it could not be done."""


class Heartbeat(Protocol):
    """Tells other processes that this one makes progress; see `dflow.services.heartbeat`."""

    def beat(self) -> None:
        """A pass has finished. Throttled; may raise StoreUnavailableError."""


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set. Call in the main thread."""
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


def every(seconds: float, stop: threading.Event) -> Callable[[Counts], None]:
    """Return a wait for `run_forever`: a fixed pause between passes that ends early when asked to stop."""

    def wait(counts: Counts) -> None:
        stop.wait(seconds)

    return wait


def run_forever(
    service: Service,
    *,
    wait: Callable[[Counts], None],
    stop: threading.Event,
    health: Health | None = None,
    heartbeat: Heartbeat | None = None,
    on_pass: Callable[[Counts], None] | None = None,
    stall_after_seconds: float = 0.0,
) -> None:
    """Run passes until ``stop`` is set.

    :param wait: called between passes with the counts of the last one; returns when the next is due.
    :param on_pass: called after each finished pass; for tests and metrics.
    :param stall_after_seconds: how long one pass may take before the process gives itself up; 0 = for ever.
    """
    watchdog = Watchdog(stall_after_seconds, service.name) if stall_after_seconds > 0 else None
    failures = Failures(service.name)
    try:
        while not stop.is_set():
            try:
                if watchdog:
                    watchdog.begin()
                counts = service.run_once()
                if heartbeat:
                    heartbeat.beat()
            except Exception as error:  # noqa: BLE001 - a loop outlives any one pass; see the module's promises
                if health:
                    health.failed(_one_line(error))
                stop.wait(failures.note(error))
                continue
            finally:
                if watchdog:
                    watchdog.end()
            failures.clear()
            if health:
                health.passed()
            if on_pass:
                on_pass(counts)
            if not stop.is_set():
                wait(counts)
                if health:
                    health.turned()
    finally:
        if watchdog:
            watchdog.close()


class Watchdog:
    """Ends the process when one pass takes too long: a stalled scheduler that looks alive helps nobody."""

    def __init__(self, limit_seconds: float, name: str, *, give_up: Callable[[], None] | None = None) -> None:
        self._limit = limit_seconds
        self._name = name
        self._give_up = give_up or _exit_stalled
        self._began_at: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self) -> None:
        """A pass begins."""
        self._began_at = time.monotonic()

    def end(self) -> None:
        """The pass has ended."""
        self._began_at = None

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            began_at = self._began_at
            if began_at is not None and time.monotonic() - began_at > self._limit:
                log.critical("a pass of %s has not ended in %.0f s; giving up this process", self._name, self._limit)
                self._give_up()
                return


class Failures:
    """Logs the first of a row of failures and paces the retries."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pause = _FIRST_PAUSE_SECONDS
        self._last: str | None = None

    def note(self, error: Exception) -> float:
        """Log it unless it was the last one too; return the pause before the next pass, in seconds."""
        is_outage = isinstance(error, _OUTAGES)
        kind = type(error).__name__ if is_outage else f"{type(error).__name__}: {_one_line(error)}"
        if kind != self._last:
            self._last = kind
            if is_outage:
                log.warning("%s waits: %s", self._name, _one_line(error))
            else:
                log.error("a pass of %s failed", self._name, exc_info=error)
        pause, self._pause = self._pause, min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        return pause

    def clear(self) -> None:
        """A pass has finished."""
        if self._last is not None:
            log.info("%s goes on", self._name)
            self._last = None
            self._pause = _FIRST_PAUSE_SECONDS


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _exit_stalled() -> None:
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    logging.shutdown()
    os._exit(STALLED_EXIT_CODE)

"""The scheduler: accounts ends, plans what follows, admits within the limits, publishes. Any number run side by side.

One pass is one transaction, then one publish:

    timers -> start queued runs -> lock runs with ends, take their inbox -> plan -> apply -> admit -> commit -> publish

The commit does not wait for the disk: whatever a crash of the database loses of it is done again from rows. A pass that
fails changes nothing; a publish that fails is repeated from rows by `dflow.services.publishing`. The scheduler imports
no user code, forks nothing and reads nothing from Celery.

Passes are woken by the doorbell, by the next delay that ends, and by the poll that makes a lost ring harmless. What is
not on the path from an end to the next start (creating due runs, rescuing lost attempts, ...) runs in
`dflow.services.housekeeping`, a thread beside it with its own connection.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from dflow.broker.doorbell import Doorbell, doorbell_for
from dflow.core.errors import StoreUnavailableError
from dflow.core.messages import Nudge
from dflow.executors.base import Executor
from dflow.executors.registry import executor_for
from dflow.services.accounting import Accounted, Accounting
from dflow.services.affinity import Share
from dflow.services.base import Counts, run_forever, stop_on_signals
from dflow.services.health import Health, HealthServer
from dflow.services.heartbeat import ServiceHeartbeat
from dflow.services.housekeeping import Housekeeping, services_of_scheduler
from dflow.services.publishing import Publishing
from dflow.services.startup import await_schema
from dflow.services.throughput import Throughput
from dflow.services.timers import Timers
from dflow.settings import Settings
from dflow.store import runs, scheduling
from dflow.store.admission import admit
from dflow.store.engine import Store, Tx
from dflow.store.scheduling import take_ends

log = logging.getLogger(__name__)

_RUNS_PER_PASS: Final = 100
_STARTS_PER_PASS: Final = 20
_LOOK_AFTER_OTHERS_SECONDS: Final = 0.5  # how soon the runs of a scheduler that died are seen to
_SEVERAL_ENDS: Final = 4
_BREATH_SECONDS: Final = 0.004  # after several ends: the next batch is larger, and batches are what is cheap
_DEEP_BREATH_SECONDS: Final = 0.02  # ... and longer while the workers have so much work that nobody waits for us:
_MUCH_WORK: Final = 64


@dataclass(slots=True)
class _Work:
    """What one transaction did."""

    accounted: Accounted
    retried: int = 0
    started: int = 0
    nudges: list[Nudge] = field(default_factory=list)
    lost: list[Nudge] = field(default_factory=list)


class Scheduler:
    """The planning loop's service. One thread."""

    name = "scheduler"

    def __init__(
        self, store: Store, executor: Executor, doorbell: Doorbell, settings: Settings, *, share: Share | None = None
    ) -> None:
        self._store = store
        self._executor_name = executor.name
        self._doorbell = doorbell
        self._limit = settings.scheduler.max_tis_per_query
        self._lookahead_seconds = settings.scheduler.lookahead
        self._poll_interval = settings.scheduler.poll_interval
        self.actor = f"scheduler {socket.gethostname()}:{os.getpid()}"
        self._accounting = Accounting(self.actor)
        self._share = share
        self._timers = Timers(self.actor, poll_interval_seconds=self._poll_interval)
        self._throughput = Throughput()
        self._publishing = Publishing(executor, republish_after_seconds=settings.scheduler.republish_after)
        self._poll_due_at = 0.0
        self._has_room_for_runs = False
        self._in_flight = 0  # a guess: what this scheduler admitted and has not seen end; forgotten when all is quiet

    def run_once(self) -> Counts:
        """One pass. Raises what the store raises; then nothing has changed."""
        work = self._store.run(self._transaction, sync=False)
        self._accounting.committed()
        self._publishing.committed()
        self._throughput.ended(work.accounted.ends_by_queue, time.monotonic())
        self._has_room_for_runs = work.accounted.ended_runs > 0
        self._note_in_flight(admitted=len(work.nudges), ended=work.accounted.ends)
        self._publishing.publish(work.nudges, again=work.lost)
        return {
            "ends": work.accounted.ends,
            "planned": work.accounted.planned,
            "retried": work.retried,
            "runs_started": work.started,
            "runs_ended": work.accounted.ended_runs,
            "admitted": len(work.nudges),
            "republished": len(work.lost),
        }

    def wait(self, counts: Counts) -> None:
        """Return when the next pass is due."""
        if counts["ends"] >= _SEVERAL_ENDS:
            time.sleep(_DEEP_BREATH_SECONDS if self._in_flight >= _MUCH_WORK else _BREATH_SECONDS)
        if not self._has_room_for_runs:  # after the end of a run, look at once whether another may start
            left = min(self._poll_due_at - time.monotonic(), self._timers.seconds_left())
            if self._share and not self._share.is_alone:
                left = min(left, _LOOK_AFTER_OTHERS_SECONDS)
            self._doorbell.wait(max(0.0, left))

    def close(self) -> None:
        """Write down what was published last, so that nobody publishes it again."""
        self._store.run(self._publishing.write_down_all, sync=False)

    def _note_in_flight(self, *, admitted: int, ended: int) -> None:
        is_quiet = not admitted and not ended
        self._in_flight = 0 if is_quiet else max(0, self._in_flight + admitted - ended)

    def _transaction(self, tx: Tx) -> _Work:
        self._accounting.begin()
        is_poll = time.monotonic() >= self._poll_due_at
        retried = self._timers.fire(tx)
        with_ends = take_ends(tx, _RUNS_PER_PASS, self._share.current(tx) if self._share else None)
        # A ring with nothing in the inbox is how a new run or an unpaused DAG shows; a run that ended makes room.
        may_start = is_poll or self._has_room_for_runs or not with_ends
        started = runs.start_queued(tx, _STARTS_PER_PASS) if may_start else []
        accounted = self._accounting.account(tx, with_ends, started, datetime.now(UTC))
        self._publishing.write_down(tx)
        lost = self._publishing.lost(tx, self._limit) if is_poll else []
        if is_poll:
            self._poll_due_at = time.monotonic() + self._poll_interval
        has_scheduled = bool(accounted.scheduled or retried) or scheduling.has_scheduled(tx)
        return _Work(accounted, retried, len(started), self._admit(tx) if has_scheduled else [], lost)

    def _admit(self, tx: Tx) -> list[Nudge]:
        lookahead = self._throughput.lookahead(self._lookahead_seconds, time.monotonic())
        return admit(tx, executor=self._executor_name, limit=self._limit, lookahead=lookahead, actor=self.actor)


def main(settings: Settings) -> int:
    """Run a scheduler until SIGTERM or SIGINT; return the exit code."""
    stop = stop_on_signals()
    executor = executor_for(settings)  # wrong settings end the start, a database that is away does not
    doorbell = doorbell_for(settings)
    # Passes never wait for the disk, whatever beside them does; said once for the connection, it costs no round trip.
    store = Store.from_settings(settings, "scheduler", pool_size=1, is_durable=False)
    health = Health("scheduler", threshold_seconds=settings.scheduler.health_check_threshold)
    server = HealthServer(health, port=settings.scheduler.health_check_port).start()
    log.info("scheduler starts: executor %s, health at %s", executor.name, server.url)
    try:
        if await_schema(store, health, stop):
            _run(settings, store, executor, doorbell, health, server.url, stop)
    finally:
        doorbell.close()
        server.stop()
        store.close()
    log.info("scheduler has stopped")
    return 0


def _run(
    settings: Settings,
    store: Store,
    executor: Executor,
    doorbell: Doorbell,
    health: Health,
    health_url: str,
    stop: threading.Event,
) -> None:
    """Run passes, and housekeeping beside them, until asked to stop; then end in order."""
    heartbeat = ServiceHeartbeat(store, "scheduler", health_url=health_url)
    share = Share(heartbeat.kind, heartbeat.service_id)
    scheduler = Scheduler(store, executor, doorbell, settings, share=share)
    beside = Store.from_settings(settings, "scheduler housekeeping", pool_size=1)
    housekeeping = Housekeeping(
        services_of_scheduler(beside, doorbell, settings, actor=scheduler.actor),
        health=health,
        stall_after_seconds=settings.scheduler.stall_after,
    )
    thread = threading.Thread(target=housekeeping.run, args=(stop,), name="housekeeping")
    executor.start()
    thread.start()
    try:
        run_forever(
            scheduler,
            wait=scheduler.wait,
            stop=stop,
            health=health,
            heartbeat=heartbeat,
            stall_after_seconds=settings.scheduler.stall_after,
        )
    finally:
        stop.set()
        executor.stop()
        thread.join()
        beside.close()
        _close(scheduler, heartbeat)


def _close(scheduler: Scheduler, heartbeat: ServiceHeartbeat) -> None:
    try:
        scheduler.close()
    except StoreUnavailableError as error:
        log.warning("ending without the database: %s", error)
    heartbeat.close()

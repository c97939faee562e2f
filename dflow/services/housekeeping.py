"""What a scheduler does beside its passes, each at its own interval: a thread with a connection of its own.

A slow or failing service delays neither the passes nor, for long, the others: each is tried again after its interval,
its failure logged once. Every scheduler runs all of them; they take different rows.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from dflow.broker.doorbell import Doorbell
from dflow.services.base import Failures, Service, Watchdog
from dflow.services.health import Health
from dflow.services.rescuer import Rescuer
from dflow.services.run_creator import RunCreator
from dflow.services.run_timeouts import RunTimeouts
from dflow.services.sweeper import Sweeper
from dflow.settings import Settings
from dflow.store.engine import Store


@dataclass(slots=True)
class _Chore:
    service: Service
    interval_seconds: float
    failures: Failures
    due_at: float = field(default_factory=time.monotonic)


class Housekeeping:
    """Runs services one after the other until asked to stop."""

    def __init__(self, services: list[tuple[Service, float]], *, health: Health, stall_after_seconds: float) -> None:
        self._chores = [_Chore(service, interval, Failures(service.name)) for service, interval in services]
        self._health = health
        self._stall_after = stall_after_seconds

    def run(self, stop: threading.Event) -> None:
        """The thread's body."""
        watchdog = Watchdog(self._stall_after, "housekeeping")
        try:
            while not stop.is_set():
                for chore in self._chores:
                    if chore.due_at <= time.monotonic() and not stop.is_set():
                        watchdog.begin()
                        self._run(chore)
                        watchdog.end()
                stop.wait(max(0.0, min(chore.due_at for chore in self._chores) - time.monotonic()))
        finally:
            watchdog.close()

    def _run(self, chore: _Chore) -> None:
        pause = chore.interval_seconds
        try:
            counts = chore.service.run_once()
        except Exception as error:  # noqa: BLE001 - one service must not stop the others
            pause = max(pause, chore.failures.note(error))
            self._health.info[chore.service.name] = {"error": str(error)}
        else:
            chore.failures.clear()
            self._health.info[chore.service.name] = dict(counts)
        chore.due_at = time.monotonic() + pause


def services_of_scheduler(
    store: Store, doorbell: Doorbell, settings: Settings, *, actor: str
) -> list[tuple[Service, float]]:
    """Return the services every scheduler runs, with the seconds between their passes."""
    lease = settings.worker.lease_seconds
    poll = settings.scheduler.poll_interval
    return [
        (RunCreator(store, doorbell, settings), poll),
        (RunTimeouts(store, doorbell, actor=actor), poll),
        (
            Rescuer(store, doorbell, infra_retries=settings.core.infra_retries, lease_seconds=lease, actor=actor),
            min(2.0, lease / 8),
        ),
        (Sweeper(store, doorbell), 30.0),
    ]

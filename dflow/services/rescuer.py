"""Rescues attempts whose worker is gone: its lease ended, or it left and still held some.

The attempt ends with a cause that names the host; the task instance is tried again out of the budget for losses
(`core.infra_retries`), never out of the user's retries. Several rescuers side by side take different rows.

Leases are judged by the database's clock, and not right after nobody could renew: the database itself refuses to for
one full lease after it started, and this process for one full lease after it could not reach the database.
"""

from __future__ import annotations

import logging
import time

from dflow.broker.doorbell import Doorbell
from dflow.core.errors import StoreUnavailableError
from dflow.core.retry import after_infra_loss
from dflow.core.states import Reason, TaskState
from dflow.services.base import Counts
from dflow.store import workers
from dflow.store.apply import Change, apply
from dflow.store.engine import Store, Tx
from dflow.store.workers import LostAttempt

log = logging.getLogger(__name__)


class Rescuer:
    """One pass: declare workers gone, end what they held."""

    name = "rescuer"

    def __init__(
        self, store: Store, doorbell: Doorbell, *, infra_retries: int, lease_seconds: float, actor: str
    ) -> None:
        self._store = store
        self._doorbell = doorbell
        self._infra_retries = infra_retries
        self._lease_seconds = lease_seconds
        self._actor = actor
        self._not_before = 0.0  # monotonic

    def run_once(self) -> Counts:
        """Rescue what is lost; return ``{"workers": declared gone, "attempts": rescued}``."""
        if time.monotonic() < self._not_before:
            return {"workers": 0, "attempts": 0}
        try:
            gone, rescued = self._store.run(self._rescue)
        except StoreUnavailableError:
            # Whoever could not reach the database could not renew either; give them all one lease to come back.
            self._not_before = time.monotonic() + self._lease_seconds
            raise
        if rescued:
            self._doorbell.ring()
        return {"workers": gone, "attempts": rescued}

    def _rescue(self, tx: Tx) -> tuple[int, int]:
        gone = workers.expire(tx)
        for worker in gone:
            log.warning("worker %s on %s is gone: %s", worker.name, worker.hostname, worker.cause)
        lost = workers.lost_attempts(tx)
        rescued = apply(tx, [self._change(attempt) for attempt in lost])
        if rescued:
            log.warning("rescued %d attempts of workers that are gone", len(rescued))
        return len(gone), len(rescued)

    def _change(self, lost: LostAttempt) -> Change:
        cause = _cause(lost)
        if lost.is_cancelled:
            return self._end(lost, TaskState.FAILED, Reason.CANCELLED, f"cancelled; {cause}", 0.0)
        seed = f"{lost.dag_id}/{lost.run_pk}/{lost.task_id}/{lost.map_index}"
        decision = after_infra_loss(losses=lost.infra_failures + 1, infra_retries=self._infra_retries, seed=seed)
        return self._end(
            lost, decision.to_state, Reason.LEASE_LOST, f"{cause}; {decision.cause}", decision.delay_seconds
        )

    def _end(self, lost: LostAttempt, to_state: TaskState, reason: Reason, cause: str, delay_seconds: float) -> Change:
        return Change(
            ti_id=lost.ti_id,
            from_state=TaskState.RUNNING,
            to_state=to_state,
            reason=reason,
            attempt_id=lost.attempt_id,
            actor=self._actor,
            cause=cause,
            delay_seconds=delay_seconds if to_state is TaskState.UP_FOR_RETRY else None,
            infra_failure=True,
        )


def _cause(lost: LostAttempt) -> str:
    host = lost.hostname or "unknown host"
    worker = f" (worker {lost.worker_name}: {lost.cause})" if lost.worker_name else ""
    return f"lease lost on host {host}{worker}"

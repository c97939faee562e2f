"""Ends runs past their `dagrun_timeout`: what has not started is skipped, what runs is stopped, the run fails."""

from __future__ import annotations

import logging

from dflow.broker.doorbell import Doorbell
from dflow.core.states import Reason
from dflow.services.base import Counts
from dflow.store import runs
from dflow.store.engine import Store, Tx

log = logging.getLogger(__name__)


class RunTimeouts:
    """One pass: stop every run whose time is up. Several side by side take different runs."""

    name = "run-timeouts"

    def __init__(self, store: Store, doorbell: Doorbell, *, actor: str) -> None:
        self._store = store
        self._doorbell = doorbell
        self._actor = actor

    def run_once(self) -> Counts:
        """Return ``{"runs": stopped}``."""
        stopped = self._store.run(self._stop)
        if stopped:
            self._doorbell.ring()
        return {"runs": stopped}

    def _stop(self, tx: Tx) -> int:
        late = runs.timed_out(tx)
        for run in late:
            cause = f"dagrun_timeout of {run.timeout_seconds:g} s has passed"
            runs.stop(tx, run, actor=self._actor, reason=Reason.RUN_TIMEOUT, cause=cause)
            log.warning("run %s of %s ends: %s", run.run_id, run.dag_id, cause)
        return len(late)

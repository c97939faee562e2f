"""The nets under everything else: stuck runs, rows of services that died, workers long gone.

None of it should ever find anything after a crash but dead rows; a stuck run would be a fault of the planner or of a
person with psql, and is planned anew from its rows.
"""

from __future__ import annotations

import logging
from typing import Final

from dflow.broker.doorbell import Doorbell
from dflow.services.base import Counts
from dflow.store import scheduling, services, workers
from dflow.store.engine import Store, Tx

log = logging.getLogger(__name__)

_IDLE_SECONDS: Final = 20.0
_RUNS_PER_PASS: Final = 100
_KEEP_SECONDS: Final = 7 * 24 * 3600.0


class Sweeper:
    """One pass over what should not be there."""

    name = "sweeper"

    def __init__(self, store: Store, doorbell: Doorbell) -> None:
        self._store = store
        self._doorbell = doorbell

    def run_once(self) -> Counts:
        """Return ``{"stuck": runs planned anew, "services": deleted, "workers": deleted}``."""
        counts = self._store.run(self._sweep)
        if counts["stuck"]:
            self._doorbell.ring()
        return counts

    def _sweep(self, tx: Tx) -> dict[str, int]:
        stuck = scheduling.poke_stuck_runs(tx, idle_seconds=_IDLE_SECONDS, limit=_RUNS_PER_PASS)
        if stuck:
            log.warning("planning runs anew in which nothing moved: %s", ", ".join(map(str, stuck)))
        return {
            "stuck": len(stuck),
            "services": services.prune(tx, _KEEP_SECONDS),
            "workers": workers.prune(tx, _KEEP_SECONDS),
        }

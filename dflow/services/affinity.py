"""Which runs this scheduler prefers when there are several.

Every scheduler sees the same list of live ones, so each takes the runs whose number falls to its place in it at once,
and those of the others only when their ends have waited a moment (`dflow.store.runs.Affinity`). It keeps the states of
a run in the memory of one scheduler; nothing depends on it: locks decide, and a list out of date costs a moment.
"""

from __future__ import annotations

import time
from typing import Final

from dflow.store import services
from dflow.store.engine import Tx
from dflow.store.runs import Affinity

_REFRESH_SECONDS: Final = 5.0
_DEAD_AFTER_SECONDS: Final = 15.0


class Share:
    """This scheduler's share, looked up now and then. ``service_id`` is its row's."""

    def __init__(self, kind: str, service_id: str) -> None:
        self._kind = kind
        self._service_id = service_id
        self._affinity = Affinity()
        self._due_at = 0.0

    @property
    def is_alone(self) -> bool:
        """Is there no other, as far as is known?"""
        return self._affinity.count == 1

    def current(self, tx: Tx) -> Affinity:
        """Return the share; everything, while this scheduler is alone or not in the list yet."""
        if time.monotonic() >= self._due_at:
            live = [one.id for one in services.list_live(tx, self._kind, within_seconds=_DEAD_AFTER_SECONDS)]
            self._affinity = _place(live, self._service_id)
            self._due_at = time.monotonic() + _REFRESH_SECONDS
        return self._affinity


def _place(live: list[str], service_id: str) -> Affinity:
    return Affinity(index=live.index(service_id), count=len(live)) if service_id in live else Affinity()

"""Celery's consumer, which comes back soon after Redis does.

Celery waits longer after each failed attempt to connect, up to half a minute; a worker has to consume again within
seconds of the broker's return.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from celery.worker.consumer import Consumer as CeleryConsumer

_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 3.0


class Consumer(CeleryConsumer):  # type: ignore[misc]  # Celery has no types
    """What ``worker_consumer`` names."""

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, however long it takes, asking again every few seconds."""
        conn.ensure_connection = partial(
            conn.ensure_connection,
            interval_start=_FIRST_PAUSE_SECONDS,
            interval_step=_FIRST_PAUSE_SECONDS,
            interval_max=_LONGEST_PAUSE_SECONDS,
        )
        return super().ensure_connected(conn)

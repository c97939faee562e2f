"""The service row: which schedulers and dag-processors exist and when each last finished a pass.

The row is written from the service's own loop, never from a thread beside it: a heartbeat that goes on while the loop
hangs is a lie. It is throttled, registered lazily (the database may be away at start) and registered anew when somebody
removed the row.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid

import dflow
from dflow.core.errors import StoreUnavailableError
from dflow.store import services
from dflow.store.engine import Store

log = logging.getLogger(__name__)


class ServiceHeartbeat:
    """One row in table `service`, for this incarnation of one process."""

    def __init__(self, store: Store, kind: str, *, health_url: str | None = None, every_seconds: float = 5.0) -> None:
        self.service_id = str(uuid.uuid4())
        self._store = store
        self.kind = kind
        self._health_url = health_url
        self._every = every_seconds
        self._due_at = 0.0
        self._is_registered = False

    def beat(self) -> None:
        """A pass has finished: register, or say so at most every ``every_seconds``."""
        now = time.monotonic()
        if now < self._due_at:
            return
        with self._store.begin(sync=False) as tx:
            if not self._is_registered or not services.heartbeat(tx, self.service_id):
                services.register(
                    tx,
                    service_id=self.service_id,
                    kind=self.kind,
                    hostname=socket.gethostname(),
                    pid=os.getpid(),
                    health_url=self._health_url,
                    version=dflow.__version__,
                )
        self._is_registered = True
        self._due_at = now + self._every

    def close(self) -> None:
        """The process ends in good order: close the row, if the database is there."""
        if not self._is_registered:
            return
        try:
            with self._store.begin() as tx:
                services.deregister(tx, self.service_id)
        except StoreUnavailableError as error:
            log.warning("could not close the service row: %s", error)

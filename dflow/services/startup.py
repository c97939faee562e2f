"""Before the first pass: a service waits until the database is there and has the schema this version works with.

Components of a cluster start in any order, beside the migration; none of them should need a restart for that.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from dflow.core.errors import SchemaError, StoreUnavailableError
from dflow.services.health import Health
from dflow.store import schema
from dflow.store.engine import Store

log = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 1.0


def await_schema(store: Store, health: Health, stop: threading.Event) -> bool:
    """Return True when the schema is right, False when asked to stop; what is waited for is logged once."""
    last: str | None = None
    while not stop.is_set():
        try:
            schema.check(store)
        except (SchemaError, StoreUnavailableError) as error:
            message = str(error)
            health.failed(message)
            if message != last:
                last = message
                log.warning("%s waits: %s", health.component, message)
            stop.wait(_PAUSE_SECONDS)
        else:
            return True
    return False

"""Rings the doorbell from a thread: a slow Redis must not hold whoever wants it rung."""

from __future__ import annotations

import threading
from typing import Final

from dflow.broker.doorbell import Doorbell

_LAST_SECONDS: Final = 2.0  # the doorbell bounds itself well below that


class Ringer:
    """Rings that meet become one."""

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._wanted = threading.Event()
        self._is_finished = False
        self._thread = threading.Thread(target=self._serve, name="dflow-ringer", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        """Ring soon."""
        self._wanted.set()

    def finish(self) -> None:
        """Ring once more and end."""
        self._is_finished = True
        self._wanted.set()
        self._thread.join(_LAST_SECONDS)

    def _serve(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            self._doorbell.ring()
            if self._is_finished:
                return

"""LocalExecutor: a FIFO queue and up to 32 warm processes on this machine. Needs Postgres, but no Redis.

The processes belong to one *host* process (`dflow.executors.local_host`), started here as a program of its own: the
scheduler itself never forks and never imports user code. Nudges go to the host over a socket pair. When the host dies
it is started again; what it had in its queue stays `queued` in the rows and is published again. When the scheduler dies
the host sees the end of the socket and drains.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

from dflow.core.errors import PublishError
from dflow.core.messages import Nudge
from dflow.runtime.protocol import encode_frame
from dflow.settings import Settings

log = logging.getLogger(__name__)

NAME: Final = "LocalExecutor"
_SEND_TIMEOUT_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 0.2
_LONGEST_PAUSE_SECONDS: Final = 10.0
_STEADY_SECONDS: Final = 30.0  # a host that lived this long was well; the next restart is at once
_OVERTIME_SECONDS: Final = 10.0


class LocalExecutor:
    """Keeps one host process alive and passes nudges on to it."""

    name = NAME

    def __init__(self, settings: Settings, *, processes: int | None = None) -> None:
        self._settings = settings
        self._processes = processes or settings.core.parallelism
        self._lock = threading.Lock()
        self._host: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_stopping = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def host_pid(self) -> int | None:
        """The process id of the host, for people and tests."""
        host = self._host
        return None if host is None else host.pid

    def start(self) -> None:
        """Start the host; it registers as a worker by itself, as soon as the database is there."""
        self._start_host()
        self._keeper = threading.Thread(target=self._keep, name="local-host-keeper", daemon=True)
        self._keeper.start()

    def publish(self, nudges: Sequence[Nudge]) -> None:
        """Append to the host's queue; raises PublishError while there is no host."""
        if not nudges:
            return
        frame = encode_frame({"op": "run", "nudges": [[nudge.ti_id, nudge.attempt_id] for nudge in nudges]})
        with self._lock:
            try:
                if self._control is None:
                    raise PublishError("the host of the local processes is being restarted")
                self._control.sendall(frame)
            except OSError as error:
                self._close_control()  # half a frame may be in it
                raise PublishError(
                    f"the host of the local processes is gone ({error}); {len(nudges)} rows are published again"
                ) from error

    def stop(self) -> None:
        """Let running attempts finish within `worker.drain_grace`, hand the rest back, and end the host."""
        self._is_stopping.set()
        with self._lock:
            self._close_control()
            host = self._host
        if host is not None:
            grace = self._settings.worker.drain_grace + self._settings.worker.kill_grace + _OVERTIME_SECONDS
            try:
                host.wait(grace)
            except subprocess.TimeoutExpired:
                log.error("the host of the local processes did not end within %.0f s; killing it", grace)
                host.kill()
                host.wait()
        if self._keeper is not None:
            self._keeper.join()

    def _start_host(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(_SEND_TIMEOUT_SECONDS)
        with theirs:
            host = subprocess.Popen(
                [sys.executable, "-m", "dflow.executors.local_host"],
                stdin=theirs.fileno(),
                env={**os.environ, **self._settings.as_env()},
                start_new_session=True,  # a Ctrl-C in the terminal is for the scheduler, which drains
            )
        with self._lock:
            self._close_control()
            self._host, self._control = host, ours
            try:
                ours.sendall(encode_frame({"op": "config", "executor": self.name, "processes": self._processes}))
            except OSError:
                pass  # it died at once; the keeper sees that

    def _keep(self) -> None:
        """The keeper's thread: start the host again whenever it ends without being asked to."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            started_at = time.monotonic()
            host = self._host
            assert host is not None
            status = host.wait()
            if self._is_stopping.is_set():
                return
            with self._lock:
                self._close_control()
            pause = _FIRST_PAUSE_SECONDS if time.monotonic() - started_at > _STEADY_SECONDS else pause
            log.error("the host of the local processes ended with status %s; restarting it in %g s", status, pause)
            if self._is_stopping.wait(pause):
                return
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            self._start_host()

    def _close_control(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

"""The doorbell: tells the schedulers that attempts have ended. A hint, never truth.

A ring carries nothing; whoever hears it looks into Postgres. A lost ring costs at most `scheduler.poll_interval`, for
`wait` is always bounded, so nothing here is retried, persisted or acknowledged. `RedisDoorbell` is one PUBLISH on one
channel (never a NOTIFY: that takes an instance-wide lock at commit); `LocalDoorbell` is a datagram to each listener's
Unix socket in one directory, for executors that need no Redis.

Promises: `ring` never raises and never blocks for long; `wait` never raises, answers all rings so far at once, and
returns True once after every new subscription, because a ring may have been missed before it.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
import uuid
from pathlib import Path
from typing import Any, Final, Protocol

import redis

from dflow.broker.address import redis_py_url
from dflow.settings import Settings

log = logging.getLogger(__name__)

CHANNEL: Final = "dflow.doorbell"
_QUIET_SECONDS: Final = 1.0  # after a failed ring, how long not to try again
_RING_TIMEOUT_SECONDS: Final = 1.0  # the agent rings between two batches; it must not hang on a dead Redis
_SUN_PATH_MAX: Final = 100


class Doorbell(Protocol):
    """Wakes whoever waits."""

    def ring(self) -> None:
        """Wake every waiter, in every process. Safe to call from several threads."""

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for a ring, at most so long; True if there was one. Call from one thread only."""

    def close(self) -> None:
        """Let go of sockets. Not needed before exit."""


class RedisDoorbell:
    """PUBLISH and SUBSCRIBE on one channel; the prefix keeps clusters that share a Redis apart."""

    def __init__(self, broker_url: str, *, prefix: str = "", socket_timeout_seconds: float = 5.0) -> None:
        self._channel = f"{prefix}{CHANNEL}"
        bounded = min(socket_timeout_seconds, _RING_TIMEOUT_SECONDS)
        self._client = redis.Redis.from_url(
            redis_py_url(broker_url),
            socket_timeout=bounded,
            socket_connect_timeout=bounded,
            health_check_interval=10,
            retry=None,
        )
        self._pubsub: Any = None
        self._quiet_until = 0.0
        self._is_away = False

    def ring(self) -> None:
        """Publish one empty message."""
        if time.monotonic() < self._quiet_until:
            return
        try:
            self._client.publish(self._channel, b"")
        except (redis.RedisError, OSError) as error:
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            self._note_away(error)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for a message; without Redis just wait, the caller's poll is the safety net."""
        deadline = time.monotonic() + timeout_seconds
        try:
            if self._pubsub is None:
                self._subscribe()
                return True
            while (left := deadline - time.monotonic()) > 0 or timeout_seconds <= 0:
                if self._next_message(max(left, 0.0)):
                    while self._next_message(0.0):
                        pass
                    return True
                if timeout_seconds <= 0:
                    break
        except (redis.RedisError, OSError) as error:
            self._note_away(error)
            self._unsubscribe()
            time.sleep(max(0.0, deadline - time.monotonic()))
        return False

    def close(self) -> None:
        """Close both connections."""
        self._unsubscribe()
        self._client.close()

    def _subscribe(self) -> None:
        pubsub: Any = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        try:
            pubsub.subscribe(self._channel)
        except BaseException:
            pubsub.close()
            raise
        self._pubsub = pubsub
        if self._is_away:
            self._is_away = False
            log.info("the doorbell is connected to Redis again")

    def _unsubscribe(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            try:
                pubsub.close()
            except (redis.RedisError, OSError):
                pass

    def _next_message(self, timeout_seconds: float) -> bool:
        """True for a ring; False when time is up, or for a pong or the answer to our SUBSCRIBE."""
        message = self._pubsub.get_message(timeout=timeout_seconds)
        return message is not None and message["type"] == "message"

    def _note_away(self, error: Exception) -> None:
        if not self._is_away:
            self._is_away = True
            log.warning("the doorbell cannot reach Redis (%s); polling until it is back", error)


class LocalDoorbell:
    """Each waiter binds a datagram socket in ``directory``; a ring sends one byte to every socket there."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._own: Path | None = None
        self._receiver: socket.socket | None = None
        self._sender = _datagram_socket()

    def ring(self) -> None:
        """Send to every listener; a socket nobody listens on belongs to a dead process and is removed."""
        for path in self._directory.glob("*.sock"):
            try:
                with _Address(path) as address:
                    self._sender.sendto(b"!", address)
            except BlockingIOError:
                pass  # its buffer is full of rings
            except OSError as error:
                if error.errno == errno.ECONNREFUSED:
                    path.unlink(missing_ok=True)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for a datagram, then take all that are there."""
        if self._receiver is None or self._own is None or not self._own.exists():
            self._listen()
            return True
        if not _readable(self._receiver, timeout_seconds):
            return False
        try:
            while True:
                self._receiver.recv(16)
        except BlockingIOError:
            return True

    def close(self) -> None:
        """Stop listening and remove the own socket."""
        self._sender.close()
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        if self._own is not None:
            self._own.unlink(missing_ok=True)
            self._own = None

    def _listen(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._receiver = _datagram_socket()
        self._own = self._directory / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.sock"
        with _Address(self._own) as address:
            self._receiver.bind(address)


class _Address:
    """A path as a socket address; one too long (over some 100 bytes) goes by way of its directory's descriptor."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def __enter__(self) -> str:
        if len(os.fsencode(self._path)) <= _SUN_PATH_MAX:
            return str(self._path)
        self._descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._descriptor}/{self._path.name}"

    def __exit__(self, *exc: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def _readable(sock: socket.socket, timeout_seconds: float) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(max(timeout_seconds, 0.0) * 1000))


def _datagram_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


def doorbell_for(settings: Settings) -> Doorbell:
    """Return the doorbell that goes with the configured executor: Redis where there is one, else the local one."""
    if settings.core.executor == "CeleryExecutor":
        return RedisDoorbell(
            settings.celery.broker_url,
            prefix=settings.celery.queue_prefix,
            socket_timeout_seconds=settings.celery.broker_socket_timeout,
        )
    return LocalDoorbell(settings.home / "run" / "doorbell")

"""The Unix socket of an agent: accepts task processes, takes their requests, answers them, notices when they are gone.

A process counts as gone when its connection ends or the process itself does (a process it forked may hold the socket
open); whatever it had sent by then is delivered first. A process whose requests pile up is not read from until they
are done, so a flood waits in the process that makes it.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from dflow.core.errors import DflowError
from dflow.runtime.live import Connection
from dflow.runtime.processes import ChildProcess
from dflow.runtime.protocol import encode_frame

log = logging.getLogger(__name__)

_READ_BYTES: Final = 256 * 1024
_BACKLOG_BYTES: Final = 4 * 1024 * 1024  # of one process; it is not read from beyond that
_PEER: Final = struct.Struct("3i")


class Switchboard:
    """The connections. Everything happens in the callbacks the selector holds as data: ``key.data(events)``.

    ``on_request(connection, message, size)`` gets each message and the bytes it accounts for, to be given back by
    `done`; a ValueError, KeyError or TypeError it raises closes that connection. ``on_gone(connection)`` is called
    once.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        path: str,
        *,
        on_request: Callable[[Connection, dict[str, Any], int], None],
        on_gone: Callable[[Connection], None],
    ) -> None:
        self._selector = selector
        self._path = path
        self._on_request = on_request
        self._on_gone = on_gone
        self._connections: dict[int, Connection] = {}  # by descriptor of the socket
        self._listener = _listen(path)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def reply(self, connection: Connection | None, message: Mapping[str, Any]) -> None:
        """Answer a request; nothing happens when the process is gone."""
        if connection is None or not connection.is_open:
            return
        connection.outgoing += encode_frame(message)
        self._flush(connection)

    def done(self, connection: Connection | None, size: int) -> None:
        """A request of that size no longer waits."""
        if connection is not None and size:
            connection.backlog -= size
            self._update_events(connection)

    def read_all(self) -> None:
        """Take what task processes have managed to say until now."""
        for connection in list(self._connections.values()):
            self._read(connection)

    def release(self, process: ChildProcess) -> None:
        """Stop watching a process nobody needs to know about any more."""
        if process.exit_fd is not None:
            try:
                self._selector.unregister(process.exit_fd)
            except (KeyError, ValueError):
                pass
        process.close()

    def close(self) -> None:
        """Accept nobody any more and remove the socket with its directory."""
        self._listener.close()
        Path(self._path).unlink(missing_ok=True)
        try:
            Path(self._path).parent.rmdir()
        except OSError:
            pass

    def _accept(self, _events: int) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            pid = _peer_pid(sock)
            if pid is None:
                sock.close()
                continue
            sock.setblocking(False)
            connection = Connection(sock, ChildProcess(pid))
            self._connections[sock.fileno()] = connection
            self._update_events(connection)
            exit_fd = connection.process.exit_fd
            if exit_fd is not None:
                self._selector.register(exit_fd, selectors.EVENT_READ, partial(self._on_process_end, connection))

    def _on_socket(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(connection)
        if events & selectors.EVENT_READ:
            self._read(connection)

    def _on_process_end(self, connection: Connection, _events: int) -> None:
        """What it said before its end counts."""
        if connection.process.exit_fd is not None:
            self._selector.unregister(connection.process.exit_fd)
        connection.backlog = 0  # nothing is left to hold back
        self._read(connection)
        self._close(connection)

    def _read(self, connection: Connection) -> None:
        try:
            while connection.is_open and connection.backlog <= _BACKLOG_BYTES:
                data = connection.socket.recv(_READ_BYTES)
                if not data:
                    self._close(connection)
                    return
                self._deliver(connection, data)
                if len(data) < _READ_BYTES:
                    break
        except BlockingIOError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not isinstance(error, ConnectionError):
                log.error("task process %d does not speak our protocol: %s", connection.process.pid, error)
            self._close(connection)
            return
        self._update_events(connection)

    def _deliver(self, connection: Connection, data: bytes) -> None:
        for message in connection.decoder.feed(data):
            self._on_request(connection, message, len(data))

    def _flush(self, connection: Connection) -> None:
        try:
            sent = connection.socket.send(connection.outgoing)
            del connection.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
            return
        self._update_events(connection)

    def _close(self, connection: Connection) -> None:
        if not connection.is_open:
            return
        connection.is_open = False
        self._connections.pop(connection.socket.fileno(), None)
        if connection.events:
            self._selector.unregister(connection.socket)
        connection.socket.close()
        self._on_gone(connection)

    def _update_events(self, connection: Connection) -> None:
        if not connection.is_open:
            return
        wanted = selectors.EVENT_READ if connection.backlog <= _BACKLOG_BYTES else 0
        if connection.outgoing:
            wanted |= selectors.EVENT_WRITE
        if wanted == connection.events:
            return
        callback = partial(self._on_socket, connection)
        if not connection.events:
            self._selector.register(connection.socket, wanted, callback)
        elif wanted:
            self._selector.modify(connection.socket, wanted, callback)
        else:
            self._selector.unregister(connection.socket)
        connection.events = wanted


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(256)
    listener.setblocking(False)
    return listener


def _peer_pid(sock: socket.socket) -> int | None:
    """Return the pid at the other end when it is of our own user (unix(7), SO_PEERCRED)."""
    if not hasattr(socket, "SO_PEERCRED"):
        raise DflowError("task processes can be identified on Linux only")
    pid, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid if uid == os.getuid() else None

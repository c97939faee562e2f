"""A Unix socket in front of Postgres that can be cut and joined again, for one worker's view of an outage."""

from __future__ import annotations

import selectors
import socket
import threading
from pathlib import Path

from tests.integration.worker.rig import WorkerRig


class Cut:
    """Forwards connections to the server; `cut` breaks them and refuses new ones until `join`.

    ``hang`` instead keeps them open and forwards nothing, like a network that swallows everything.
    """

    def __init__(self, directory: Path, server_dir: Path) -> None:
        self.directory = directory
        self._target = str(server_dir / ".s.PGSQL.5432")
        self._path = directory / ".s.PGSQL.5432"
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._mode = "open"
        self._is_closed = False
        self._lock = threading.Lock()
        self._listener = self._listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        with self._lock:
            self._mode = "cut"
            for one in list(self._peers):
                self._drop(one)

    def hang(self) -> None:
        with self._lock:
            self._mode = "hang"

    def join(self) -> None:
        with self._lock:
            self._mode = "open"

    def close(self) -> None:
        self._is_closed = True
        self._thread.join(5)
        self.cut()
        self._listener.close()
        self._selector.close()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self._path))
        listener.listen(50)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        return listener

    def _serve(self) -> None:
        while not self._is_closed:
            for key, _ in self._selector.select(0.1):
                with self._lock:
                    self._handle(key.fileobj)  # type: ignore[arg-type]
            if self._mode == "hang":
                threading.Event().wait(0.05)

    def _handle(self, sock: socket.socket) -> None:
        if sock is self._listener:
            client, _ = sock.accept()
            if self._mode != "open":
                client.close()
                return
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.connect(self._target)
            for one, other in ((client, server), (server, client)):
                self._peers[one] = other
                self._selector.register(one, selectors.EVENT_READ)
        elif self._mode != "hang" and sock in self._peers:
            try:
                data = sock.recv(65536)
                if data:
                    self._peers[sock].sendall(data)
                    return
            except OSError:
                pass
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        other = self._peers.pop(sock, None)
        if other is None:
            return
        self._peers.pop(other, None)
        for one in (sock, other):
            self._selector.unregister(one)
            one.close()


def through(rig: WorkerRig, cut: Cut, server_dir: Path) -> dict[str, str]:
    """Return the environment of a worker that reaches the database through the cut."""
    url = rig.settings.database.sql_alchemy_conn
    assert str(server_dir) in url, url
    return {"DFLOW__DATABASE__SQL_ALCHEMY_CONN": url.replace(str(server_dir), str(cut.directory))}

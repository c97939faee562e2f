"""The agent of a worker machine, as the process that starts it sees it; run as a module this *is* the agent.

A worker's parent process (Celery's, or the host of a local executor) starts one agent before its first task process.
The two share a socket pair and nothing else: the parent asks over it to drain, reports how its children ended and how
many it has; the agent says when it is ready, how it is, and that it is going. When either end closes, the other side
knows: an agent without a parent ends the tasks, hands their attempts back and goes; a parent without an agent must end
its children and go, which `on_exit` is for.

    agent = AgentProcess.start(settings, name="w1@host", executor="CeleryExecutor", queues=["default"], concurrency=4,
                               on_exit=lambda end: os._exit(1))
    env = {"DFLOW_AGENT_SOCKET": agent.socket_path}     # for the task processes
    ...
    agent.drain(60.0)
    agent.stop()
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from dflow.core.errors import AgentStartError
from dflow.runtime.protocol import FrameDecoder, encode_frame
from dflow.settings import Settings

log = logging.getLogger(__name__)

EXIT_STOPPED: Final = 0  # asked to, or the parent is gone
EXIT_FAILED: Final = 1  # a defect, or a start that cannot succeed
EXIT_DEAF: Final = 74  # the worker no longer consumes
EXIT_FENCED: Final = 75  # the lease could not be renewed in time
_PREFIX: Final = "dflow-agent-"
_LONGEST_SOCKET_DIR: Final = 60  # a Unix socket's path has room for some 100 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What an agent is told by its parent. ``queues`` ("*" for all) and ``concurrency`` go into the lease's row."""

    name: str
    executor: str
    queues: Sequence[str]
    concurrency: int
    health_url: str | None
    socket_path: str
    parent_pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEnd:
    """How an agent went. Not ``is_expected`` (by `drain` or `stop`): the parent must end its children and go."""

    exit_code: int
    cause: str
    is_expected: bool


class AgentProcess:
    """The handle of a running agent.

    All methods but `wait` and `stop` return at once and are safe from any thread and from a signal handler: one thread
    owns the socket.
    """

    def __init__(
        self,
        config: AgentConfig,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        on_exit: Callable[[AgentEnd], None] | None,
        on_status: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self._config = config
        self._process = process
        self._control = control
        self._on_exit = on_exit
        self._on_status = on_status
        self._outgoing: deque[dict[str, Any]] = deque()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._is_expected = False
        self._cause = ""
        self._ready = threading.Event()
        self._gone = threading.Event()
        self._end: AgentEnd | None = None
        os.register_at_fork(after_in_child=self._close_in_fork)
        threading.Thread(target=self._serve, name="dflow-agent", daemon=True).start()

    @classmethod
    def start(
        cls,
        settings: Settings,
        *,
        name: str,
        executor: str,
        queues: Sequence[str],
        concurrency: int,
        health_url: str | None = None,
        on_exit: Callable[[AgentEnd], None] | None = None,
        on_status: Callable[[Mapping[str, Any]], None] | None = None,
        should_give_up: Callable[[], bool] = lambda: False,
    ) -> Self:
        """Start an agent and return when it holds a lease.

        While Postgres is away this waits, saying so in the log, until ``should_give_up`` (asked twice a second).
        ``on_exit`` is called once, from a thread, when a started agent has gone; ``on_status``, from the same thread,
        with what the agent says about itself after each renewal: ``database`` (can it be reached), ``draining``,
        ``running``, ``claimed``. Raises AgentStartError.
        """
        _remove_stale_directories()
        directory = _socket_directory()
        config = AgentConfig(
            name=name, executor=executor, queues=tuple(queues), concurrency=concurrency, health_url=health_url,
            socket_path=str(directory / "agent.sock"), parent_pid=os.getpid(),
        )  # fmt: skip
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "dflow.runtime.agent"],
                stdin=theirs.fileno(),
                env={**os.environ, **settings.as_env()},
                start_new_session=True,  # a Ctrl-C in the terminal is for the parent, which drains
            )
        agent = cls(config, process, ours, on_exit, on_status)
        agent._send({"op": "config", "config": asdict(config)})
        while not agent._ready.wait(0.5):
            if agent._gone.is_set() or should_give_up():
                agent._on_exit = None
                agent.stop(timeout_seconds=2.0)
                cause = agent._cause or "see its log above"
                raise AgentStartError(f"the agent of worker {name} did not start: {cause}")
        return agent

    @property
    def socket_path(self) -> str:
        """The Unix socket task processes connect to."""
        return self._config.socket_path

    @property
    def pid(self) -> int:
        """Of the agent."""
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        """Whether the agent has ended."""
        return self._gone.is_set()

    def drain(self, grace_seconds: float) -> None:
        """Claim nothing more; after the grace end what still runs and hand it back. A shorter grace may follow."""
        self._is_expected = True
        self._send({"op": "drain", "grace": grace_seconds})

    def consuming(self) -> None:
        """Tell that the worker has begun, or begun again, to take messages; until then it cannot be deaf."""
        self._send({"op": "consuming"})

    def resize(self, concurrency: int) -> None:
        """Tell how many task processes there are now."""
        self._send({"op": "resize", "concurrency": concurrency})

    def report_child_exit(self, pid: int, exit_code: int | None) -> None:
        """Tell how a task process ended: its exit code, or minus the number of the signal that killed it."""
        self._send({"op": "child_exit", "pid": pid, "exit_code": exit_code})

    def wait(self, timeout_seconds: float | None = None) -> AgentEnd | None:
        """Wait for the end of the agent; None when it has not come in time."""
        self._gone.wait(timeout_seconds)
        return self._end

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """End the agent now that the task processes are done; attempts that still run are ended and handed back."""
        self._is_expected = True
        self._send({"op": "stop"})
        if self.wait(timeout_seconds) is None:
            log.warning("the agent did not stop within %g s; killing it", timeout_seconds)
            self._process.kill()
            self.wait(5.0)
        shutil.rmtree(Path(self.socket_path).parent, ignore_errors=True)

    def _send(self, message: dict[str, Any]) -> None:
        self._outgoing.append(message)
        try:
            os.write(self._wake_writer, b"!")
        except OSError:
            pass  # full: the thread is awake anyway

    def _serve(self) -> None:
        """The thread that owns the socket: sends what was asked, hears what the agent says, sees its end."""
        decoder = FrameDecoder()
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            is_open = True
            while is_open:
                for key, _ in selector.select():
                    if key.fileobj == self._wake_reader:
                        os.read(self._wake_reader, 4096)
                        is_open = self._send_outgoing() and is_open
                    else:
                        is_open = self._receive(decoder) and is_open
        self._ended()

    def _send_outgoing(self) -> bool:
        try:
            while self._outgoing:
                self._control.sendall(encode_frame(self._outgoing.popleft()))
        except OSError:
            return False
        return True

    def _receive(self, decoder: FrameDecoder) -> bool:
        try:
            data = self._control.recv(65536)
        except OSError:
            data = b""
        for message in decoder.feed(data):
            match message["op"]:
                case "ready":
                    self._ready.set()
                case "how_ended":
                    self._look_how_ended(message["pid"])
                case "status":
                    if self._on_status is not None:
                        self._on_status(message)
                case "exit":
                    self._cause = message["cause"]
                    self._is_expected = self._is_expected and message["code"] == EXIT_STOPPED
        return bool(data)

    def _look_how_ended(self, pid: int) -> None:
        """Tell how a child of ours ended, leaving its status for its owner to collect.

        Independent of the owner's loop, which may be busy. A child collected already was reported by its owner.
        """
        try:
            status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if status is not None:
            has_exited = status.si_code == os.CLD_EXITED
            self.report_child_exit(pid, status.si_status if has_exited else -status.si_status)

    def _ended(self) -> None:
        try:
            exit_code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            exit_code = self._process.wait()
        how = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exited with code {exit_code}"
        self._cause = self._cause or how
        self._end = AgentEnd(exit_code=exit_code, cause=self._cause, is_expected=self._is_expected)
        self._gone.set()
        shutil.rmtree(Path(self.socket_path).parent, ignore_errors=True)
        if self._on_exit is not None and self._ready.is_set():
            self._on_exit(self._end)

    def _close_in_fork(self) -> None:
        """A forked task process must not hold the connection open after its parent's death."""
        descriptors = (self._control.detach(), self._wake_reader, self._wake_writer)
        self._wake_reader = self._wake_writer = -1  # this runs again when the child forks: the numbers are others' then
        for descriptor in descriptors:
            try:
                os.close(descriptor)
            except OSError:
                pass


def _socket_directory() -> Path:
    """Make a directory for this user only. The name holds our pid, so that leftovers can be told."""
    base = tempfile.gettempdir()
    base = base if len(os.fsencode(base)) <= _LONGEST_SOCKET_DIR else "/tmp"  # noqa: S108 mkdtemp makes it ours
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))


def _remove_stale_directories() -> None:
    """Remove the socket directories of parents that were killed together with their agents."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = directory.name.removeprefix(_PREFIX).partition("-")[0]
        try:
            if directory.stat().st_uid == os.getuid() and pid.isdigit() and not _exists(int(pid)):
                shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            continue


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main() -> int:
    """Be the agent: the parent's end of the socket pair is standard input."""
    from dflow.runtime.agent_loop import run_agent

    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return run_agent(control)


def config_from_json(data: Mapping[str, Any]) -> AgentConfig:
    """The reverse of what `AgentProcess` sends."""
    return AgentConfig(**json.loads(json.dumps(dict(data))))


if __name__ == "__main__":
    sys.exit(main())

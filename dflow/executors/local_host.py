"""The host of the local executors' task processes; a program: ``python -m dflow.executors.local_host``.

It keeps a FIFO queue of nudges and a number of warm task processes, forked as they are needed from this process, which
has everything but user code imported. Each process runs `dflow.runtime.child.ChildLoop`, as a Celery worker's does, and
speaks to the same agent. Standard input is a socket pair with the scheduler: frames in, and its end means drain.

Promises: one nudge per process at a time, in the order of the queue; a process that dies is reported to the agent with
its wait status and replaced; without an agent no process lives on; on SIGTERM, and when the scheduler is gone, nothing
more is claimed, running attempts have `worker.drain_grace` seconds, and no process is left behind.
"""

from __future__ import annotations

import logging
import os
import select
import selectors
import signal
import socket
import sys
import time
import warnings
from collections import deque
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, NoReturn

import psutil

from dflow import settings as settings_module
from dflow.core.errors import AgentStartError
from dflow.runtime.agent import AgentEnd, AgentProcess
from dflow.runtime.child import ChildLoop
from dflow.runtime.protocol import FrameDecoder, read_frame, write_frame
from dflow.settings import Settings
from dflow.telemetry import logging as telemetry_logging

log = logging.getLogger(__name__)

EXIT_DRAINED: Final = 0
EXIT_NO_AGENT: Final = 1
_MEBIBYTE: Final = 1024 * 1024
_OVERTIME_SECONDS: Final = 5.0  # after the grace and the kill grace: then the processes are killed here


@dataclass(slots=True)
class TaskProcess:
    """A forked task process, seen from here."""

    pid: int
    sock: socket.socket
    is_busy: bool = False


class LocalHost:
    """The loop: one thread, woken by the scheduler, by task processes and by signals."""

    def __init__(self, settings: Settings, control: socket.socket, *, executor: str, processes: int) -> None:
        self._settings = settings
        self._control = control
        self._executor = executor
        self._max_processes = processes
        self._decoder = FrameDecoder()
        self._queue: deque[list[Any]] = deque()
        self._processes: dict[int, TaskProcess] = {}  # by pid
        self._idle: list[TaskProcess] = []  # the warmest last
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = _pipe()
        self._agent: AgentProcess | None = None
        self._agent_end: AgentEnd | None = None
        self._is_asked_to_stop = False
        self._drain_until: float | None = None  # monotonic

    def run(self) -> int:
        """Serve until the scheduler is gone or asks to stop; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop_signal)
        signal.signal(signal.SIGCHLD, self._on_child_signal)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        try:
            self._agent = AgentProcess.start(
                self._settings,
                name=f"local-{os.getpid()}@{socket.gethostname()}",
                executor=self._executor,
                queues=["*"],
                concurrency=self._max_processes,
                on_exit=self._on_agent_exit,
                should_give_up=self._should_give_up,
            )
        except AgentStartError as error:
            if self._should_give_up():
                return EXIT_DRAINED
            log.error("%s", error)
            return EXIT_NO_AGENT
        self._selector.register(self._control, selectors.EVENT_READ, self._on_control)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._on_wake)
        try:
            return self._serve()
        finally:
            self._kill_all()

    def _serve(self) -> int:
        assert self._agent is not None
        while self._agent_end is None:
            if self._is_asked_to_stop and self._drain_until is None:
                self._begin_drain()
            if self._drain_until is not None and (not self._processes or time.monotonic() > self._drain_until):
                self._kill_all()
                self._agent.stop()
                return EXIT_DRAINED
            self._hand_out()
            timeout = None if self._drain_until is None else max(0.0, self._drain_until - time.monotonic())
            for key, _ in self._selector.select(timeout):
                key.data(key.fileobj)
        log.error("the agent is gone (%s); ending the task processes", self._agent_end.cause)
        return EXIT_NO_AGENT

    # --- the queue

    def _hand_out(self) -> None:
        """Give the oldest nudges to idle processes, and to new ones while there may be more."""
        while self._queue and self._drain_until is None:
            if not self._idle and len(self._processes) >= self._max_processes:
                return
            process = self._idle.pop() if self._idle else self._fork()
            ti_id, attempt_id = self._queue.popleft()
            process.is_busy = True
            try:
                write_frame(process.sock, {"ti_id": ti_id, "attempt_id": attempt_id})
            except OSError:
                # It has just died; its end is on the way here. Nothing was claimed: the nudge goes to another one.
                self._queue.appendleft([ti_id, attempt_id])
                self._unwatch(process)

    def _on_control(self, control: socket.socket) -> None:
        try:
            data = control.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(control)
            self._is_asked_to_stop = True
            return
        for frame in self._decoder.feed(data):
            if frame["op"] == "run":
                self._queue.extend(frame["nudges"])

    # --- the processes

    def _fork(self) -> TaskProcess:
        assert self._agent is not None
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_child(theirs)
        theirs.close()
        process = TaskProcess(pid, ours)
        self._processes[pid] = process
        self._selector.register(ours, selectors.EVENT_READ, self._on_done)
        return process

    def _become_child(self, sock: socket.socket) -> NoReturn:
        """In the forked process: let go of the host's descriptors, then run attempts until told not to."""
        assert self._agent is not None
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._selector.close()
            self._control.close()
            for process in self._processes.values():
                process.sock.close()
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            code = serve_attempts(self._settings, sock, self._agent.socket_path)
        except BaseException:
            log.exception("a task process failed")
        finally:
            logging.shutdown()
            os._exit(code)

    def _on_done(self, sock: socket.socket) -> None:
        """A process has finished its attempt, or closed its end because it goes."""
        process = next((one for one in self._processes.values() if one.sock is sock), None)
        if process is None:
            return
        try:
            data = sock.recv(4096)
        except OSError:
            data = b""
        if data and self._drain_until is None:
            process.is_busy = False
            self._idle.append(process)
        elif data:
            sock.shutdown(socket.SHUT_WR)  # draining: it reads the end and goes
        else:
            self._unwatch(process)

    def _unwatch(self, process: TaskProcess) -> None:
        """Stop listening to a process. Its death shows by its status: a task's own children may hold the socket."""
        if process in self._idle:
            self._idle.remove(process)
        try:
            self._selector.unregister(process.sock)
        except KeyError:
            pass

    def _on_wake(self, reader: int) -> None:
        try:
            os.read(reader, 4096)
        except BlockingIOError:
            pass
        self._collect_dead()

    def _collect_dead(self) -> None:
        assert self._agent is not None
        for process in list(self._processes.values()):
            pid, status = os.waitpid(process.pid, os.WNOHANG)
            if pid == 0:
                continue
            self._agent.report_child_exit(pid, os.waitstatus_to_exitcode(status))
            self._unwatch(process)
            process.sock.close()
            del self._processes[pid]

    # --- the end

    def _begin_drain(self) -> None:
        """Claim nothing more. What is still in the queue was never claimed: its rows are published again by others."""
        assert self._agent is not None
        grace = self._settings.worker.drain_grace
        log.info("draining: %d processes, %g s of grace", len(self._processes), grace)
        self._drain_until = time.monotonic() + grace + self._settings.worker.kill_grace + _OVERTIME_SECONDS
        self._queue.clear()
        self._agent.drain(grace)
        for process in self._processes.values():
            if not process.is_busy:
                process.sock.shutdown(socket.SHUT_WR)

    def _kill_all(self) -> None:
        for process in self._processes.values():
            os.kill(process.pid, signal.SIGKILL)
        for process in self._processes.values():
            os.waitpid(process.pid, 0)
        self._processes.clear()

    def _on_agent_exit(self, end: AgentEnd) -> None:
        """In the agent's thread."""
        if not end.is_expected:
            self._agent_end = end
            os.write(self._wake_writer, b"!")

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_asked_to_stop = True

    def _on_child_signal(self, number: int, frame: FrameType | None) -> None:
        """The wake-up descriptor does the work; without a handler Python would not write to it."""

    def _should_give_up(self) -> bool:
        return self._is_asked_to_stop or _is_closed(self._control)


def serve_attempts(settings: Settings, sock: socket.socket, agent_socket: str) -> int:
    """Be a task process: run what arrives, one at a time, until the host closes its end or a limit is reached."""
    loop = ChildLoop(settings, socket_path=agent_socket)
    limit, memory_limit = settings.worker.max_tasks_per_child, settings.worker.max_memory_per_child_mb
    own = psutil.Process()
    count = 0
    while (frame := read_frame(sock)) is not None:
        loop.run_one(frame["ti_id"], frame["attempt_id"])
        count += 1
        if 0 < limit <= count or 0 < memory_limit * _MEBIBYTE < own.memory_info().rss:
            break  # leaves without an answer: the host forks a fresh one when it needs it
        sock.sendall(b"!")
    return 0


def main() -> int:
    """Be the host of the scheduler at the other end of standard input."""
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    config = read_frame(control)
    if config is None:
        return EXIT_DRAINED
    # Python warns (3.12+) of forking beside threads. The one thread here, the agent's, holds no lock a child takes.
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    settings = settings_module.load()
    telemetry_logging.configure(settings, "local-host")
    control.setblocking(False)
    return LocalHost(settings, control, executor=config["executor"], processes=config["processes"]).run()


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    return reader, writer


def _is_closed(sock: socket.socket) -> bool:
    """Has the other side closed? Looks without taking anything."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    if not poller.poll(0):
        return False
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


if __name__ == "__main__":
    sys.exit(main())

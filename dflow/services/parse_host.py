"""The process that forks sandboxes: one clean, preloaded interpreter that parses one file at a time.

    dag-processor --(socket)--> host --(fork)--> sandbox that imports the file

The host itself never imports user code: a fork of it starts with dflow loaded (a few milliseconds instead of a fresh
interpreter's start) and with nothing of any earlier file. It answers each request with exactly one reply, whatever the
sandbox does: hang, exit, crash, print without end, or leave processes behind. When a file is done, every process that
descends from its sandbox is killed, also those that went into a session of their own: the host is the subreaper of all
of them (Linux: prctl(2), PR_SET_CHILD_SUBREAPER).

Run by `dflow.services.parse_pool` as ``python -m dflow.services.parse_host FD PARENT_PID``. It ends with its parent.
"""

from __future__ import annotations

import ctypes
import gc
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

import psutil

from dflow.runtime.protocol import read_frame, write_frame
from dflow.services import parse_child

MAX_OUTPUT_BYTES: Final = 64 * 1024
_PIPE_READ_BYTES: Final = 64 * 1024
_MAX_PIPE_BYTES: Final = 1024 * 1024
_SWEEP_SECONDS: Final = 5.0
_PR_SET_CHILD_SUBREAPER: Final = 36


def main() -> int:
    """Serve requests until the other side closes the socket."""
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        signal.signal(signal.SIGTERM, _on_sigterm)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parse_child.die_with_parent(int(sys.argv[2]), signal.SIGTERM)
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        gc.collect()
        gc.freeze()  # a fork's garbage collector leaves the shared pages alone
        while (request := read_frame(sock)) is not None:
            write_frame(sock, supervise(request))
    return 0


def supervise(request: Mapping[str, Any]) -> dict[str, Any]:
    """Fork a sandbox for one file, watch it to its end and return the reply; afterwards nothing of it is left."""
    began_at = time.monotonic()
    sandbox = _Sandbox(request)
    try:
        with _interruptible():
            sandbox.watch(began_at + float(request["timeout_seconds"]))
    finally:
        sandbox.kill()
        _kill_descendants()
    sandbox.drain()
    sandbox.close()
    return {**sandbox.reply(), "duration_seconds": time.monotonic() - began_at}


class _Sandbox:
    """One forked child and the host's ends of its two pipes."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._request = request
        self._result, result_fd = _Pipe.make(limit=parse_child.LENGTH.size + parse_child.MAX_RESULT_BYTES)
        self._output, output_fd = _Pipe.make(limit=MAX_OUTPUT_BYTES)
        self._status: int | None = None
        self._is_timed_out = False
        self._peak_rss_bytes = 0
        host_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            parse_child.parse(request, result_fd=result_fd, output_fd=output_fd, host_pid=host_pid)
        os.close(result_fd)
        os.close(output_fd)

    def watch(self, deadline: float) -> None:
        """Read both pipes until the child has ended or its time is over."""
        with selectors.DefaultSelector() as selector:
            for pipe in (self._result, self._output):
                selector.register(pipe.fd, selectors.EVENT_READ, pipe)
            while not self._has_ended():
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    self._is_timed_out = True
                    return
                # The end of the child closes its pipes and wakes us, unless a process it started holds them. Both
                # closed: it is about to end.
                pause = 0.05 if selector.get_map() else 0.001
                for key, _ in selector.select(min(remaining, pause)):
                    if not key.data.read():
                        selector.unregister(key.fd)

    def kill(self) -> None:
        """Kill the child's process group: whatever it started and did not move elsewhere dies in the same instant."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        if self._status is None:
            try:
                os.kill(self.pid, signal.SIGKILL)  # it may not have made its own group yet
            except ProcessLookupError:
                pass
            self._reap(0)

    def drain(self) -> None:
        """Read what is left in the pipes; no more than they can hold, should a writer have survived."""
        for pipe in (self._result, self._output):
            for _ in range(_MAX_PIPE_BYTES // _PIPE_READ_BYTES):
                if not pipe.read():
                    break

    def close(self) -> None:
        self._result.close()
        self._output.close()

    def reply(self) -> dict[str, Any]:
        """Return the child's answer, or why there is none."""
        body = bytes(self._result.head)
        size = parse_child.LENGTH.size
        is_complete = len(body) >= size and len(body) == size + parse_child.LENGTH.unpack(body[:size])[0]
        return {
            "answer": body[size:].decode(errors="replace") if is_complete and not self._is_timed_out else None,
            "failure": None if is_complete and not self._is_timed_out else self._why_no_answer(),
            "output": self._output.text(),
            "peak_rss_bytes": self._peak_rss_bytes,
        }

    def _why_no_answer(self) -> str:
        if self._is_timed_out:
            limit = float(self._request["timeout_seconds"])
            return (
                f"the import did not end within {limit:g} s (dag_processor.dag_file_processor_timeout) and was killed; "
                "move slow work from the top of the file into tasks, or raise the setting"
            )
        code = os.waitstatus_to_exitcode(self._status or 0)
        if code < 0:
            return (
                f"the process was killed by signal {-code} ({_signal_name(-code)}) while it imported the file, "
                f"at a peak of {self._peak_rss_bytes / 2**20:,.0f} MiB (dag_processor.memory_limit_mb is "
                f"{self._request['memory_limit_mb']})"
            )
        return f"the process ended with exit code {code} while it imported the file (os._exit, or a library that exits)"

    def _has_ended(self) -> bool:
        if self._status is None:
            self._reap(os.WNOHANG)
        return self._status is not None

    def _reap(self, options: int) -> None:
        pid, status, usage = os.wait4(self.pid, options)
        if pid:
            self._status = status
            self._peak_rss_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(slots=True, kw_only=True)
class _Pipe:
    """The reading end of a pipe; keeps the first ``limit`` bytes and throws the rest away."""

    fd: int
    limit: int
    head: bytearray = field(default_factory=bytearray)
    dropped: int = 0

    @classmethod
    def make(cls, *, limit: int) -> tuple[_Pipe, int]:
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        return cls(fd=read_fd, limit=limit), write_fd

    def read(self) -> bool:
        """Take what is there; False when there is nothing (more)."""
        try:
            piece = os.read(self.fd, _PIPE_READ_BYTES)
        except BlockingIOError:
            return False
        kept = piece[: self.limit - len(self.head)]
        self.head += kept
        self.dropped += len(piece) - len(kept)
        return bool(piece)

    def text(self) -> str:
        text = self.head.decode(errors="replace")
        return f"{text}\n[{self.dropped:,} more bytes were dropped]" if self.dropped else text

    def close(self) -> None:
        os.close(self.fd)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end this process inside the block, and only there: never halfway through starting or cleaning up.

    There may be more than one: the kernel sends one for each thread of a parent that is killed.
    """
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _kill_descendants() -> None:
    """Kill all that is left of the sandbox; as subreaper, this process is (or becomes) the parent of every orphan."""
    deadline = time.monotonic() + _SWEEP_SECONDS
    while _reap_orphans() and time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            try:
                process.kill()
            except psutil.Error:
                pass
        time.sleep(0.002)


def _reap_orphans() -> bool:
    """Collect ended children; return whether any are still alive."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    raise SystemExit(0)  # `supervise` cleans up on its way out


if __name__ == "__main__":
    sys.exit(main())

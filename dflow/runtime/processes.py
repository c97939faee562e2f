"""Processes an agent must be sure about: is it alive, kill exactly it and all it started, how much memory did it use.

A pid says nothing after its process has ended; on Linux a `pidfd` names the process itself, elsewhere pid and start
time together do. What a task started is found three ways, for a process can leave its parent and its session but
seldom its environment: as a descendant, by session, and by the attempt id in the environment.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from pathlib import Path
from typing import Final

import psutil

log = logging.getLogger(__name__)

_STATUS_PEAK: Final = b"VmHWM:"
_KILL_ROUNDS: Final = 5  # a process may start another between our look and our kill


class ChildProcess:
    """One task process, named beyond its pid."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd: int | None = None
        self._process: psutil.Process | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):
            try:
                self._process = psutil.Process(pid)
            except psutil.Error:
                pass  # it has ended already

    @property
    def exit_fd(self) -> int | None:
        """A descriptor that turns readable when the process ends, where the system has one."""
        return self._pidfd

    def is_alive(self) -> bool:
        """False once it has ended, whether or not its parent has collected it."""
        if self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return not poll.poll(0)
        try:
            return (
                self._process is not None
                and self._process.is_running()
                and self._process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.Error:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process and no other; nothing happens when it has ended."""
        try:
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            elif self._process is not None:
                self._process.send_signal(number)
        except (OSError, psutil.Error):
            pass

    def kill_tree(self, attempt_variable: str | None = None) -> None:
        """SIGKILL the process and what it started. ``attempt_variable`` is ``NAME=value`` of their environment."""
        found = _descendants(self.pid) if self.is_alive() else []
        self.signal(signal.SIGKILL)
        for _ in range(_KILL_ROUNDS):
            found += _left_behind(self.pid, attempt_variable)
            if not found:
                return
            for process in found:
                try:
                    process.kill()
                except psutil.Error:
                    pass
            psutil.wait_procs(found, timeout=0.2)
            found = []

    def wait_gone(self, timeout_seconds: float) -> bool:
        """Return whether it has ended within the time."""
        if self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return bool(poll.poll(timeout_seconds * 1000))
        deadline = time.monotonic() + timeout_seconds
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.is_alive()

    def peak_rss_bytes(self) -> int | None:
        """Return the high-water mark of resident memory so far; None when the system does not say."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_bytes()
        except OSError:
            return None
        for line in status.splitlines():
            if line.startswith(_STATUS_PEAK):
                return int(line.split()[1]) * 1024
        return None

    def close(self) -> None:
        """Let go of the descriptor."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _left_behind(session: int, attempt_variable: str | None) -> list[psutil.Process]:
    """Processes of the session, or with the variable in the environment they were started with."""
    needle = attempt_variable.encode() if attempt_variable else None
    found = []
    for pid in psutil.pids():
        if pid in (session, os.getpid()):
            continue
        try:
            is_ours = os.getsid(pid) == session
            if not is_ours and needle is not None:
                is_ours = needle in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if is_ours:
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


class OomCounter:
    """Has the kernel killed for memory since the last look? Reads counters, never the kernel's log.

    The cgroup's own counter where there is one (v2 `memory.events`, v1 `memory.oom_control`), else the host's
    (`/proc/vmstat`, Linux 4.13+).
    """

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._files = (*_cgroup_files(proc, cgroups), proc / "vmstat")
        self._seen = self._read()

    def has_risen(self) -> bool:
        """Return whether a process was killed for memory since the last call that said so."""
        now = self._read()
        has_risen = now > self._seen
        self._seen = now
        return has_risen

    def _read(self) -> int:
        for file in self._files:
            try:
                for line in file.read_text().splitlines():
                    if line.startswith("oom_kill "):
                        return int(line.split()[1])
            except (OSError, ValueError):
                continue
        return 0


def _cgroup_files(proc: Path, cgroups: Path) -> list[Path]:
    files = []
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if not controllers:
            # In a container the path is often "/" of its own namespace, mounted as the root.
            files += [cgroups / inside / "memory.events", cgroups / "unified" / inside / "memory.events"]
        elif "memory" in controllers.split(","):
            files += [cgroups / "memory" / inside / "memory.oom_control", cgroups / "memory" / "memory.oom_control"]
    return files

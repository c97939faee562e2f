"""Interrupts, the lease's clock, nudges, processes and the out-of-memory counters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import psutil
import pytest

from dflow.core.interrupts import forget, interrupt, shielded
from dflow.runtime.child import is_nudge
from dflow.runtime.lease import Lease, Watchdog, boot_seconds
from dflow.runtime.processes import ChildProcess, OomCounter
from tests.support import eventually

ATTEMPT = "5f3c6a8e-0d6b-4a7e-9b59-1c1de3c4a1f0"  # fixed: tests that run side by side must have the same names


class Interrupted(BaseException):
    pass


def test_an_interrupt_raises_at_once_or_at_the_end_of_the_outermost_shield() -> None:
    with pytest.raises(Interrupted):
        interrupt(Interrupted())
    seen = []
    with pytest.raises(Interrupted), shielded():  # noqa: PT012
        with shielded():
            interrupt(Interrupted())
            seen.append("inner")
        seen.append("outer")
    assert seen == ["inner", "outer"]


def test_a_forgotten_interrupt_is_not_raised() -> None:
    with shielded():
        interrupt(Interrupted())
        forget()


def test_a_shield_in_another_thread_shields_nothing() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with shielded():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(10)
        with pytest.raises(Interrupted):
            interrupt(Interrupted())
    finally:
        leave.set()
        thread.join()


def test_a_lease_ends_here_before_it_ends_in_the_database() -> None:
    lease = Lease(8.0)
    assert lease.is_due()
    assert lease.is_over()
    sent_at = boot_seconds()
    lease.renewed(sent_at)
    assert not lease.is_due()
    assert not lease.is_over()
    assert lease.due_at == sent_at + 2.0
    assert sent_at + 4 <= lease.ends_at <= sent_at + 8.0 - 0.5


def test_the_watchdog_does_nothing_without_work_and_after_its_stop() -> None:
    looked = threading.Event()
    fenced = []

    def has_work() -> bool:
        looked.set()
        return False

    watchdog = Watchdog(Lease(1.0), has_work=has_work, fence=lambda: fenced.append(1), exit_code=1)
    assert looked.wait(10)
    watchdog.stop()
    assert not fenced


@pytest.mark.parametrize(
    ("ti_id", "attempt_id", "expected"),
    [
        (1, ATTEMPT, True),
        (2**63 - 1, ATTEMPT, True),
        (True, ATTEMPT, False),
        (0, ATTEMPT, False),
        (2**63, ATTEMPT, False),
        ("1", ATTEMPT, False),
        (1, "x", False),
        (1, ATTEMPT.replace("-", ""), False),
        (1, None, False),
        (1, "{" + ATTEMPT + "}", False),
        (1.0, ATTEMPT, False),
        ([1], {}, False),
    ],
)
def test_only_what_the_publisher_sends_is_a_nudge(ti_id: object, attempt_id: object, expected: bool) -> None:
    assert is_nudge(ti_id, attempt_id) is expected


def test_a_process_is_killed_with_all_it_started() -> None:
    token = f"DFLOW_ATTEMPT_ID={uuid.uuid4()}"
    name, value = token.split("=")
    script = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(['sleep', '1003'])\n"
        "subprocess.Popen(['sleep', '1003'], start_new_session=True)\n"
        "subprocess.Popen(['sh', '-c', 'setsid sleep 1003 & exit 0'])\n"
        "print('up', flush=True)\n"
        "time.sleep(1003)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, name: value},
        start_new_session=True,
    )

    def family() -> list[psutil.Process]:
        found = []
        for one in psutil.process_iter():
            try:
                if one.environ().get(name) == value and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
            except psutil.Error:
                continue
        return found

    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        eventually(lambda: len([one for one in family() if one.name() == "sleep"]) == 3)
        child = ChildProcess(process.pid)
        assert child.is_alive()
        peak = child.peak_rss_bytes()
        assert peak is None or peak > 1024 * 1024
        child.kill_tree(token)
        assert child.wait_gone(10)
        assert not child.is_alive()
        eventually(lambda: not family(), 10)
        child.signal(signal.SIGKILL)  # nobody is hit by it
        child.kill_tree(token)
        child.close()
    finally:
        for one in family():
            one.kill()
        process.wait(10)
        process.stdout.close()


@pytest.mark.parametrize(
    ("cgroup", "file"),
    [
        ("0::/kube/pod1\n", "cgroup/kube/pod1/memory.events"),
        ("4:memory:/job\n0::/\n", "cgroup/memory/job/memory.oom_control"),
        ("4:memory:/not/here\n", "cgroup/memory/memory.oom_control"),
        ("", "proc/vmstat"),
    ],
)
def test_the_counter_nearest_to_us_is_read(tmp_path: Path, cgroup: str, file: str) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(cgroup)
    counter_file = tmp_path / file
    counter_file.parent.mkdir(parents=True, exist_ok=True)
    counter_file.write_text("other 5\noom_kill 2\n")
    counter = OomCounter(tmp_path / "proc", tmp_path / "cgroup")
    assert not counter.has_risen()
    counter_file.write_text("other 5\noom_kill 3\n")
    assert counter.has_risen()
    assert not counter.has_risen()


def test_without_any_counter_nothing_was_killed_for_memory(tmp_path: Path) -> None:
    assert not OomCounter(tmp_path, tmp_path).has_risen()

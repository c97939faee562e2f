"""What an agent makes of deaths, in whatever order it sees them."""

from __future__ import annotations

import signal
import time
import uuid
from typing import Any, cast

import pytest

from dflow.runtime.ends import EndKind, RetrySettings
from dflow.runtime.live import Live
from dflow.runtime.processes import ChildProcess
from dflow.runtime.wards import Wards


class FakeProcess:
    """A process that dies when it is told to, and remembers what was done to it."""

    def __init__(self, pid: int = 7) -> None:
        self.pid = pid
        self.is_running = True
        self.done: list[str] = []

    def is_alive(self) -> bool:
        return self.is_running

    def wait_gone(self, _seconds: float) -> bool:
        return not self.is_running

    def kill_tree(self, mark: str) -> None:
        self.done.append(f"kill_tree {mark.partition('=')[0]}")
        self.is_running = False

    def signal(self, number: signal.Signals) -> None:
        self.done.append(number.name)

    def peak_rss_bytes(self) -> int:
        return 1000


@pytest.fixture
def asked() -> list[int]:
    return []


@pytest.fixture
def wards(asked: list[int]) -> Wards:
    return Wards(kill_grace=0.0, ask_how_ended=asked.append)


def _live(wards: Wards, pid: int = 7) -> tuple[Live, FakeProcess]:
    process = FakeProcess(pid)
    live = Live(
        ti_id=1,
        attempt_id=str(uuid.uuid4()),
        run_pk=1,
        name="d.t",
        seed="s",
        bundle_hash="h",
        user_failures=0,
        retry=RetrySettings(retries=0, delay=0, backoff_multiplier=0, max_delay=None),
        process=cast(ChildProcess, process),
        claimed_at=time.monotonic(),
    )
    wards.add(live)
    return live, process


def test_a_death_waits_for_its_status_and_what_was_left_behind_is_killed_at_once(
    wards: Wards, asked: list[int]
) -> None:
    live, process = _live(wards)
    process.is_running = False
    wards.lost(live)
    assert asked == [7]
    assert wards.look_after(None) == []
    assert process.done == ["kill_tree DFLOW_ATTEMPT_ID"]
    assert min(wards.instants(None)) <= time.monotonic() + 3.0
    wards.note_exit(7, -11)
    (end,) = wards.look_after(None)
    assert (end.op, end.live, end.exit_code, end.is_out_of_memory) == ("died", live, -11, False)
    assert wards.look_after(None) == [], "an end is recorded once"


def test_a_status_that_came_before_the_death_counts_but_not_that_of_an_earlier_process(wards: Wards) -> None:
    wards.note_exit(7, 3)
    live, process = _live(wards)  # the same pid, a new process
    process.is_running = False
    wards.lost(live)
    assert wards.look_after(None) == []
    wards.note_exit(7, 4)
    (end,) = wards.look_after(None)
    assert end.exit_code == 4


def test_a_death_seen_before_that_of_the_parent_is_the_workers_loss(wards: Wards) -> None:
    live, process = _live(wards)
    process.is_running = False
    wards.lost(live)
    assert wards.look_after(None) == []
    wards.kill_all(EndKind.WORKER_LOST)
    (end,) = wards.look_after(0.0)
    assert end.live is live
    assert live.kind is EndKind.WORKER_LOST


def test_the_first_reason_to_kill_stays_unless_the_attempt_is_no_longer_ours(wards: Wards) -> None:
    live, process = _live(wards)
    wards.cancel(live, "ann")
    assert process.done == ["SIGUSR1"]
    wards.look_after(None)  # the grace of nothing has passed
    assert live.kind is EndKind.CANCEL
    assert process.done == ["SIGUSR1", "kill_tree DFLOW_ATTEMPT_ID"]
    wards.kill(live, EndKind.DRAIN)
    assert live.kind is EndKind.CANCEL
    wards.kill(live, EndKind.NOT_OURS)
    assert live.kind is EndKind.NOT_OURS
    assert process.done[2:] == []


def test_limits_and_the_end_of_a_drain_kill(wards: Wards) -> None:
    limited, limited_process = _live(wards, 7)
    free, free_process = _live(wards, 8)
    wards.limit(limited, 0.0)
    wards.limit(free, None)
    wards.look_after(None)
    assert (limited.kind, free.kind) == (EndKind.TIMEOUT, None)
    wards.look_after(time.monotonic() + 60)
    assert free_process.is_running
    wards.look_after(time.monotonic())
    assert free.kind is EndKind.DRAIN
    assert not limited_process.is_running


def test_an_attempt_whose_end_is_on_its_way_is_left_alone(wards: Wards, asked: list[int]) -> None:
    live, process = _live(wards)
    live.is_ending = True
    wards.kill_all(EndKind.WORKER_LOST)
    wards.lost(live)
    result: list[Any] = wards.look_after(0.0)
    assert (result, process.done, asked) == ([], [], [])


def test_the_fence_kills_everything(wards: Wards) -> None:
    processes = [_live(wards, pid)[1] for pid in (7, 8, 9)]
    wards.fence()
    assert all(one.done == ["SIGKILL", "kill_tree DFLOW_ATTEMPT_ID"] for one in processes)

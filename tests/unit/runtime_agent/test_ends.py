"""From what is known about an attempt to the one change that ends it."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest

from dflow.core.states import Reason, TaskState, is_legal
from dflow.runtime.ends import EndKind, Facts, RetrySettings, describe_bytes, died, reported

FACTS = Facts(
    ti_id=1,
    attempt_id="a",
    seed="d|r|t|-1",
    pid=99,
    kind=None,
    cancelled_by=None,
    timeout_seconds=None,
    exit_code=None,
    is_out_of_memory=False,
    peak_rss_bytes=120 * 1024 * 1024,
    user_failures=0,
    retry=RetrySettings(retries=1, delay=7.0, backoff_multiplier=0, max_delay=None),
    infra_failures=0,
    infra_retries=3,
    max_retry_delay=86400,
)


def _died(**changes: Any) -> tuple[TaskState, Reason, bool, bool, str | None]:
    change = died(replace(FACTS, **changes), actor="worker w")
    assert is_legal(change.from_state, change.to_state)
    assert change.attempt_id == "a"
    return change.to_state, change.reason, change.user_failure, change.infra_failure, change.cause


@pytest.mark.parametrize(
    ("exit_code", "expected"),
    [
        (3, (TaskState.UP_FOR_RETRY, Reason.EXITED, True, False, "exited with code 3, peak 120 MiB")),
        (0, (TaskState.UP_FOR_RETRY, Reason.EXITED, True, False, "exited with code 0, peak 120 MiB")),
        (
            -signal.SIGSEGV,
            (TaskState.UP_FOR_RETRY, Reason.SIGNALLED, True, False, "killed by signal 11 (SIGSEGV), peak 120 MiB"),
        ),
        (
            -signal.SIGKILL,
            (TaskState.UP_FOR_RETRY, Reason.SIGNALLED, False, True, "killed by signal 9 (SIGKILL), peak 120 MiB"),
        ),
        (
            -signal.SIGTERM,
            (TaskState.UP_FOR_RETRY, Reason.SIGNALLED, False, True, "killed by signal 15 (SIGTERM), peak 120 MiB"),
        ),
        (None, (TaskState.UP_FOR_RETRY, Reason.SIGNALLED, False, True, "process 99 disappeared, peak 120 MiB")),
    ],
)
def test_a_process_that_ended_by_itself(exit_code: int | None, expected: tuple[Any, ...]) -> None:
    assert _died(exit_code=exit_code) == expected


def test_out_of_memory_is_the_tasks_own_failure_and_says_how_much() -> None:
    cause = "killed by the kernel: out of memory, peak 3.9 GiB"
    peak = int(3.9 * 1024**3)
    expected = (TaskState.UP_FOR_RETRY, Reason.OUT_OF_MEMORY, True, False, cause)
    assert _died(exit_code=-signal.SIGKILL, is_out_of_memory=True, peak_rss_bytes=peak) == expected
    assert _died(exit_code=-signal.SIGSEGV, is_out_of_memory=True)[1] is Reason.SIGNALLED


def test_budgets_end() -> None:
    assert _died(exit_code=3, user_failures=1)[0] is TaskState.FAILED
    state, _, _, _, cause = _died(exit_code=-signal.SIGKILL, infra_failures=3)
    assert state is TaskState.FAILED
    assert cause is not None
    assert "core.infra_retries" in cause


def test_what_the_agent_did_itself_counts_before_the_exit_code() -> None:
    killed = -signal.SIGKILL
    assert _died(kind=EndKind.CANCEL, cancelled_by="ann (cli)", exit_code=killed) == (
        TaskState.FAILED,
        Reason.CANCELLED,
        False,
        False,
        "cancelled by ann (cli)",
    )
    assert _died(kind=EndKind.DRAIN, exit_code=killed)[:4] == (
        TaskState.UP_FOR_RETRY,
        Reason.WORKER_DRAINED,
        False,
        False,
    )
    assert _died(kind=EndKind.WORKER_LOST, exit_code=killed)[:4] == (
        TaskState.UP_FOR_RETRY,
        Reason.WORKER_LOST,
        False,
        True,
    )
    assert _died(kind=EndKind.TIMEOUT, timeout_seconds=5.0, exit_code=killed)[:4] == (
        TaskState.UP_FOR_RETRY,
        Reason.TIMEOUT,
        True,
        False,
    )
    assert died(replace(FACTS, kind=EndKind.DRAIN), actor="w").delay_seconds == 0.0
    not_ours = died(replace(FACTS, kind=EndKind.NOT_OURS), actor="w")
    assert (not_ours.from_state, not_ours.to_state) == (TaskState.RESTARTING, TaskState.SCHEDULED)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"reason": "succeeded"}, (TaskState.SUCCESS, False, None)),
        ({"reason": "skip_raised", "cause": "no"}, (TaskState.SKIPPED, False, None)),
        ({"reason": "raised", "cause": "E"}, (TaskState.FAILED, True, None)),
        ({"reason": "raised", "cause": "E", "retry_delay": 3.0}, (TaskState.UP_FOR_RETRY, True, 3.0)),
        ({"reason": "timeout", "retry_delay": 0.0}, (TaskState.UP_FOR_RETRY, True, 0.0)),
        ({"reason": "load_failed", "retry_delay": 1.0}, (TaskState.UP_FOR_RETRY, True, 1.0)),
        ({"reason": "fail_raised", "retry_delay": 3.0}, (TaskState.FAILED, True, None)),
        ({"reason": "exited", "exit_code": 3}, (TaskState.FAILED, True, None)),
        ({"reason": "cancelled"}, (TaskState.FAILED, False, None)),
    ],
)
def test_reported_ends(message: dict[str, Any], expected: tuple[Any, ...]) -> None:
    change = reported(message, ti_id=1, attempt_id="a", actor="w", is_cancelled=False, cancelled_by=None)
    assert is_legal(change.from_state, change.to_state)
    assert (change.to_state, change.user_failure, change.delay_seconds) == expected
    assert not change.infra_failure


def test_what_fails_while_it_is_cancelled_failed_because_of_that() -> None:
    options: dict[str, Any] = {
        "ti_id": 1,
        "attempt_id": "a",
        "actor": "w",
        "is_cancelled": True,
        "cancelled_by": "ann",
    }
    change = reported({"reason": "raised", "cause": "KeyError: 1", "retry_delay": 3.0}, **options)
    assert (change.to_state, change.reason, change.cause, change.user_failure) == (
        TaskState.FAILED,
        Reason.CANCELLED,
        "cancelled by ann",
        False,
    )
    assert reported({"reason": "succeeded"}, **options).to_state is TaskState.SUCCESS


def test_sizes_for_people() -> None:
    assert describe_bytes(3 * 1024**2) == "3 MiB"
    assert describe_bytes(2 * 1024**3) == "2.0 GiB"

"""Delays stay within their bounds and budgets end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflow.core.retry import after_infra_loss, after_user_failure, next_delay_seconds
from dflow.core.states import TaskState

DELAYS = st.floats(0, 1e7)


def delay_of(
    failures: int, delay: float, multiplier: float, limit: float | None = None, cap: float = 86_400.0
) -> float:
    return next_delay_seconds(
        failures=failures, delay=delay, backoff_multiplier=multiplier, max_delay=limit, seed="d#r#t#-1", hard_cap=cap
    )


@given(failures=st.integers(1, 10**6), delay=DELAYS, multiplier=st.sampled_from([0.0, 1.0, -2.0]))
def test_without_backoff_it_is_the_delay(failures: int, delay: float, multiplier: float) -> None:
    assert delay_of(failures, delay, multiplier, limit=1.0) == delay


@given(
    failures=st.integers(1, 10**6),
    delay=DELAYS,
    multiplier=st.floats(0.01, 100).filter(lambda m: m != 1),
    limit=st.none() | st.floats(0.1, 1e6),
    cap=st.floats(1, 1e6),
)
def test_backoff_stays_within_all_limits(
    failures: int, delay: float, multiplier: float, limit: float | None, cap: float
) -> None:
    seconds = delay_of(failures, delay, multiplier, limit, cap)
    assert 0 < seconds <= min(cap, limit or cap)
    assert seconds == delay_of(failures, delay, multiplier, limit, cap)


@given(failures=st.integers(1, 12), delay=st.integers(1, 1000), multiplier=st.sampled_from([1.5, 2.0, 3.0]))
def test_backoff_lies_between_one_and_two_bases(failures: int, delay: int, multiplier: float) -> None:
    base = delay * multiplier ** (failures - 1)
    seconds = delay_of(failures, delay, multiplier, cap=1e12)
    assert base <= seconds < 2 * (base + 1)


def test_neighbours_spread() -> None:
    delays = {
        next_delay_seconds(failures=3, delay=60, backoff_multiplier=2, max_delay=None, seed=f"t{i}") for i in range(50)
    }
    assert len(delays) > 25


def test_max_retry_delay_zero_means_none() -> None:
    assert delay_of(1, 100, 2.0, limit=0.0) >= 100


@pytest.mark.parametrize(
    ("failures", "state"), [(1, "up_for_retry"), (2, "up_for_retry"), (3, "failed"), (9, "failed")]
)
def test_two_retries_are_three_attempts(failures: int, state: str) -> None:
    decision = after_user_failure(failures=failures, retries=2, delay=5, backoff_multiplier=0, max_delay=None, seed="s")
    assert decision.to_state is TaskState(state)
    assert decision.delay_seconds == (5 if state == "up_for_retry" else 0)
    assert str(failures) in decision.cause


def test_no_retries_by_default() -> None:
    decision = after_user_failure(failures=1, retries=0, delay=5, backoff_multiplier=0, max_delay=None, seed="s")
    assert decision.to_state is TaskState.FAILED


def test_infrastructure_has_its_own_short_delays_and_budget() -> None:
    decisions = [after_infra_loss(losses=losses, infra_retries=10, seed="s") for losses in range(1, 12)]
    assert [decision.to_state for decision in decisions] == [TaskState.UP_FOR_RETRY] * 10 + [TaskState.FAILED]
    assert all(1 <= decision.delay_seconds <= 30 for decision in decisions[:-1])
    assert decisions[9].delay_seconds == 30

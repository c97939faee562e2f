"""What follows a failed attempt: another one after a delay, or the end. Pure; called where the attempt ends.

Two budgets that never mix: failures of the user's code count against ``retries`` of the task, losses of the
infrastructure (a worker that vanished, a lease that ended) against ``core.infra_retries``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from dflow.core.states import TaskState

MAX_DELAY_SECONDS = 86_400.0
_INFRA_BASE_SECONDS = 1.0
_INFRA_MAX_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryDecision:
    """Where a failed attempt leaves its task instance: ``up_for_retry`` after ``delay_seconds``, or ``failed``."""

    to_state: TaskState
    delay_seconds: float
    cause: str


def next_delay_seconds(
    *,
    failures: int,
    delay: float,
    backoff_multiplier: float,
    max_delay: float | None,
    seed: str,
    hard_cap: float = MAX_DELAY_SECONDS,
) -> float:
    """Return the seconds to wait before the next attempt (Airflow 3: ``TaskInstance.next_retry_datetime``).

    ``failures`` counts the failures so far, this one included (>= 1). A ``backoff_multiplier`` of 0 (off), 1 or less
    than 0 gives plain ``delay``: the author's own word, which neither limit touches. Otherwise the base is
    ``delay * multiplier ** (failures - 1)``, rounded up to whole seconds and at least 1; the result lies in
    [base, 2 * base), at a place given by a hash of ``seed`` and ``failures``, so one attempt always gets the same
    delay while its neighbours spread. It is then limited by ``hard_cap`` (``core.max_task_retry_delay``) and by
    ``max_delay`` (``max_retry_delay`` of the task; None and 0 mean no limit).
    """
    if backoff_multiplier <= 0 or backoff_multiplier == 1:
        return max(0.0, delay)
    base = _backoff_base(failures, delay, backoff_multiplier, hard_cap)
    jittered = float(base + _hash(f"{seed}#{failures}") % base)
    return min(jittered, hard_cap, max_delay or math.inf)


def _backoff_base(failures: int, delay: float, multiplier: float, hard_cap: float) -> int:
    try:
        return max(1, math.ceil(min(delay * multiplier ** (failures - 1), hard_cap)))
    except OverflowError:
        return max(1, math.ceil(hard_cap))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def after_user_failure(
    *,
    failures: int,
    retries: int,
    delay: float,
    backoff_multiplier: float,
    max_delay: float | None,
    seed: str,
    hard_cap: float = MAX_DELAY_SECONDS,
) -> RetryDecision:
    """Decide after the user's code failed. ``failures`` includes this one; ``retries`` more than the first are allowed.

    ``seed`` names the task instance (dag, run, task, map index). The other parameters are those of
    `next_delay_seconds`.
    """
    if failures > retries:
        return RetryDecision(
            to_state=TaskState.FAILED, delay_seconds=0.0, cause=f"failed {failures} times with retries={retries}"
        )
    seconds = next_delay_seconds(
        failures=failures,
        delay=delay,
        backoff_multiplier=backoff_multiplier,
        max_delay=max_delay,
        seed=seed,
        hard_cap=hard_cap,
    )
    return RetryDecision(
        to_state=TaskState.UP_FOR_RETRY,
        delay_seconds=seconds,
        cause=f"failure {failures}, retry {failures} of {retries} in {seconds:g} s",
    )


def after_infra_loss(*, losses: int, infra_retries: int, seed: str) -> RetryDecision:
    """Decide after an attempt was lost through no fault of the task. ``losses`` includes this one.

    The delay doubles from about one second to about half a minute: long enough not to hammer a machine that kills
    whatever lands on it, short enough not to be noticed. No user retry is spent.
    """
    if losses > infra_retries:
        return RetryDecision(
            to_state=TaskState.FAILED,
            delay_seconds=0.0,
            cause=f"lost {losses} times with core.infra_retries={infra_retries}",
        )
    seconds = next_delay_seconds(
        failures=losses,
        delay=_INFRA_BASE_SECONDS,
        backoff_multiplier=2.0,
        max_delay=_INFRA_MAX_SECONDS,
        seed=f"{seed}#infra",
    )
    return RetryDecision(
        to_state=TaskState.UP_FOR_RETRY,
        delay_seconds=seconds,
        cause=f"loss {losses} of at most {infra_retries}, again in {seconds:g} s",
    )

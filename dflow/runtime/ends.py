"""How an attempt ends: from what is known about it to the one change of state. Pure.

Two ways lead here: the task's process reported an outcome, or it died without one and the agent says what it saw. User
failures spend `retries`, losses that are not the task's doing spend `core.infra_retries`, a drained or cancelled
attempt spends neither.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from dflow.core.retry import after_infra_loss, after_user_failure
from dflow.core.states import Reason, TaskState
from dflow.store.apply import Change

_INFRA_SIGNALS: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP})  # sent by people and supervisors
_FAILURES: Final = frozenset({Reason.RAISED, Reason.TIMEOUT, Reason.LOAD_FAILED, Reason.EXITED})


class EndKind(StrEnum):
    """Why the agent is ending an attempt's process itself."""

    CANCEL = "cancel"
    TIMEOUT = "timeout"
    DRAIN = "drain"
    WORKER_LOST = "worker_lost"  # the worker's parent died
    NOT_OURS = "not_ours"  # ended or given to somebody else in the database


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySettings:
    """The retry settings of a task, as its process reported them when it had loaded the DAG; see `TaskSpec`."""

    retries: int
    delay: float
    backoff_multiplier: float
    max_delay: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the agent knows about an attempt whose process died without an outcome."""

    ti_id: int
    attempt_id: str
    seed: str  # names the task instance, for the jitter of delays
    pid: int
    kind: EndKind | None  # set when the agent ended it
    cancelled_by: str | None
    timeout_seconds: float | None
    exit_code: int | None  # minus the signal number when killed; None when nobody knows
    is_out_of_memory: bool
    peak_rss_bytes: int | None
    user_failures: int  # before this attempt
    retry: RetrySettings
    infra_failures: int  # before this attempt
    infra_retries: int
    max_retry_delay: float


def reported(
    message: Mapping[str, Any], *, ti_id: int, attempt_id: str, actor: str, is_cancelled: bool, cancelled_by: str | None
) -> Change:
    """Return the change for a finish frame. ``is_cancelled``: whatever failed, failed because it was cancelled."""
    reason = Reason(message["reason"])
    cause: str | None
    delay = message.get("retry_delay")
    if reason is Reason.CANCELLED or (is_cancelled and reason not in (Reason.SUCCEEDED, Reason.SKIP_RAISED)):
        reason, to_state, cause = Reason.CANCELLED, TaskState.FAILED, _cancelled(cancelled_by)
    else:
        cause = message.get("cause")
        match reason:
            case Reason.SUCCEEDED:
                to_state = TaskState.SUCCESS
            case Reason.SKIP_RAISED:
                to_state = TaskState.SKIPPED
            case _ if reason in _FAILURES and delay is not None:
                to_state = TaskState.UP_FOR_RETRY
            case _:
                to_state = TaskState.FAILED
    is_failure = to_state in (TaskState.FAILED, TaskState.UP_FOR_RETRY) and reason is not Reason.CANCELLED
    return Change(
        ti_id=ti_id,
        from_state=TaskState.RUNNING,
        to_state=to_state,
        reason=reason,
        attempt_id=attempt_id,
        actor=actor,
        cause=cause,
        delay_seconds=delay if to_state is TaskState.UP_FOR_RETRY else None,
        user_failure=is_failure,
        exit_code=message.get("exit_code"),
        peak_rss_bytes=message.get("peak_rss"),
    )


def died(facts: Facts, *, actor: str) -> Change:
    """Return the change for an attempt whose process ended without an outcome.

    An attempt that is not ours any more changes nothing by this, except one that was cleared while it ran: that one is
    scheduled again.
    """
    match facts.kind:
        case EndKind.CANCEL:
            return _end(facts, actor, TaskState.FAILED, Reason.CANCELLED, _cancelled(facts.cancelled_by))
        case EndKind.DRAIN:
            cause = "the worker shut down and handed the attempt back"
            return _end(facts, actor, TaskState.UP_FOR_RETRY, Reason.WORKER_DRAINED, cause, delay=0.0)
        case EndKind.WORKER_LOST:
            return _infra(facts, actor, Reason.WORKER_LOST, "the worker's process died")
        case EndKind.NOT_OURS:
            return Change(
                ti_id=facts.ti_id,
                from_state=TaskState.RESTARTING,
                to_state=TaskState.SCHEDULED,
                reason=Reason.CLEARED,
                attempt_id=facts.attempt_id,
                actor=actor,
            )
        case EndKind.TIMEOUT:
            seconds = f" of {facts.timeout_seconds:g} s" if facts.timeout_seconds is not None else ""
            cause = f"execution_timeout{seconds} passed and the task did not stop: killed{_peak(facts)}"
            return _user(facts, actor, Reason.TIMEOUT, cause)
        case None:
            return _by_status(facts, actor)


def describe_signal(number: int) -> str:
    """Return ``signal 9 (SIGKILL)``."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def describe_bytes(count: int) -> str:
    """Return a size for people: ``120 MiB``, ``3.9 GiB``."""
    mebibytes = count / 1024 / 1024
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def _by_status(facts: Facts, actor: str) -> Change:
    code = facts.exit_code
    if facts.is_out_of_memory and code in (None, -signal.SIGKILL):
        return _user(facts, actor, Reason.OUT_OF_MEMORY, f"killed by the kernel: out of memory{_peak(facts)}")
    if code is None:
        return _infra(facts, actor, Reason.SIGNALLED, f"process {facts.pid} disappeared{_peak(facts)}")
    if code >= 0:
        return _user(facts, actor, Reason.EXITED, f"exited with code {code}{_peak(facts)}")
    cause = f"killed by {describe_signal(-code)}{_peak(facts)}"
    if -code in _INFRA_SIGNALS:
        return _infra(facts, actor, Reason.SIGNALLED, cause)
    return _user(facts, actor, Reason.SIGNALLED, cause)


def _user(facts: Facts, actor: str, reason: Reason, cause: str) -> Change:
    decision = after_user_failure(
        failures=facts.user_failures + 1,
        retries=facts.retry.retries,
        delay=facts.retry.delay,
        backoff_multiplier=facts.retry.backoff_multiplier,
        max_delay=facts.retry.max_delay,
        seed=facts.seed,
        hard_cap=facts.max_retry_delay,
    )
    return _end(facts, actor, decision.to_state, reason, cause, delay=decision.delay_seconds, user_failure=True)


def _infra(facts: Facts, actor: str, reason: Reason, cause: str) -> Change:
    decision = after_infra_loss(losses=facts.infra_failures + 1, infra_retries=facts.infra_retries, seed=facts.seed)
    if decision.to_state is TaskState.FAILED:
        cause = f"{cause}; {decision.cause}"
    return _end(facts, actor, decision.to_state, reason, cause, delay=decision.delay_seconds, infra_failure=True)


def _end(
    facts: Facts,
    actor: str,
    to_state: TaskState,
    reason: Reason,
    cause: str,
    *,
    delay: float | None = None,
    user_failure: bool = False,
    infra_failure: bool = False,
) -> Change:
    return Change(
        ti_id=facts.ti_id,
        from_state=TaskState.RUNNING,
        to_state=to_state,
        reason=reason,
        attempt_id=facts.attempt_id,
        actor=actor,
        cause=cause,
        delay_seconds=delay if to_state is TaskState.UP_FOR_RETRY else None,
        user_failure=user_failure,
        infra_failure=infra_failure,
        exit_code=facts.exit_code,
        peak_rss_bytes=facts.peak_rss_bytes,
    )


def _cancelled(by: str | None) -> str:
    return f"cancelled by {by}" if by else "cancelled"


def _peak(facts: Facts) -> str:
    return f", peak {describe_bytes(facts.peak_rss_bytes)}" if facts.peak_rss_bytes else ""

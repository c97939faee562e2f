"""The states of runs and task instances, the legal transitions between them, and why each happens.

This is the one table of transitions. The database holds a copy (table `legal_transition`, enforced by a trigger on
`task_instance`); a test keeps the two equal. States keep Airflow's names; ``none`` is a stored value, never NULL.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class TaskState(StrEnum):
    """The state of a task instance."""

    NONE = "none"  # created with its run; upstream tasks are not done yet
    SCHEDULED = "scheduled"  # its trigger rule holds; waits for limits and a worker
    QUEUED = "queued"  # admitted: has an attempt id, and a message was or will be published
    RUNNING = "running"  # claimed by a worker that holds a lease
    SUCCESS = "success"
    FAILED = "failed"
    SKIPPED = "skipped"
    UPSTREAM_FAILED = "upstream_failed"
    REMOVED = "removed"  # the task is no longer in the DAG
    UP_FOR_RETRY = "up_for_retry"  # waits for `not_before`, then is scheduled again
    UP_FOR_RESCHEDULE = "up_for_reschedule"  # a sensor that gave its slot back until `not_before`
    DEFERRED = "deferred"  # waits for a trigger
    RESTARTING = "restarting"  # cleared while it ran; ends its attempt, then is scheduled again


class RunState(StrEnum):
    """The state of a DAG run."""

    QUEUED = "queued"  # exists, waits for its `run_after` and for max_active_runs
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"


class RunType(StrEnum):
    """How a run came to be."""

    SCHEDULED = "scheduled"
    MANUAL = "manual"
    BACKFILL = "backfill"
    OPERATOR_TRIGGERED = "operator_triggered"
    ASSET_TRIGGERED = "asset_triggered"
    ASSET_MATERIALIZATION = "asset_materialization"


class Reason(StrEnum):
    """Why a transition happened; recorded on every event."""

    READY = "ready"  # the trigger rule holds
    TRIGGER_RULE = "trigger_rule"  # the trigger rule can no longer be met
    EMPTY = "empty"  # nothing to run; the planner completes it
    ADMITTED = "admitted"  # limits allow it
    CLAIMED = "claimed"  # a worker took it
    SUCCEEDED = "succeeded"  # the task returned
    RAISED = "raised"  # the task raised
    SKIP_RAISED = "skip_raised"  # the task raised a skip exception
    FAIL_RAISED = "fail_raised"  # the task raised a fail-without-retry exception
    TIMEOUT = "timeout"  # execution_timeout passed
    EXITED = "exited"  # the process left with an exit code
    SIGNALLED = "signalled"  # the process was killed by a signal
    OUT_OF_MEMORY = "out_of_memory"  # the kernel killed the process for memory
    LOAD_FAILED = "load_failed"  # the worker could not load the DAG code or the task from its bundle
    LEASE_LOST = "lease_lost"  # the worker's lease ended
    WORKER_LOST = "worker_lost"  # the worker's parent died; its agent handed the attempt back
    WORKER_DRAINED = "worker_drained"  # the worker shut down and handed the attempt back
    RETRY_DUE = "retry_due"  # the retry delay passed
    RESCHEDULE_DUE = "reschedule_due"
    CANCELLED = "cancelled"  # somebody cancelled the run or the task
    RUN_TIMEOUT = "run_timeout"  # dagrun_timeout passed
    MARKED = "marked"  # somebody set the state
    CLEARED = "cleared"  # somebody cleared the task instance
    REMOVED = "removed"  # the task left the DAG


TERMINAL: Final = frozenset(
    {TaskState.SUCCESS, TaskState.FAILED, TaskState.SKIPPED, TaskState.UPSTREAM_FAILED, TaskState.REMOVED}
)
ACTIVE: Final = frozenset({TaskState.QUEUED, TaskState.RUNNING})
RUN_TERMINAL: Final = frozenset({RunState.SUCCESS, RunState.FAILED})

_N, _S, _Q, _R = TaskState.NONE, TaskState.SCHEDULED, TaskState.QUEUED, TaskState.RUNNING
_OK, _F, _SK, _UF, _RM = (
    TaskState.SUCCESS,
    TaskState.FAILED,
    TaskState.SKIPPED,
    TaskState.UPSTREAM_FAILED,
    TaskState.REMOVED,
)
_RETRY, _RESCHED, _DEF, _RST = (
    TaskState.UP_FOR_RETRY,
    TaskState.UP_FOR_RESCHEDULE,
    TaskState.DEFERRED,
    TaskState.RESTARTING,
)

LEGAL_TRANSITIONS: Final[dict[TaskState, frozenset[TaskState]]] = {
    _N: frozenset({_S, _OK, _F, _SK, _UF, _RM}),
    _S: frozenset({_Q, _OK, _F, _SK, _UF, _RM, _N}),
    _Q: frozenset({_R, _S, _OK, _F, _SK, _RM, _N}),
    _R: frozenset({_OK, _F, _SK, _RETRY, _RESCHED, _DEF, _RST}),
    _RETRY: frozenset({_S, _OK, _F, _SK, _RM, _N}),
    _RESCHED: frozenset({_S, _OK, _F, _SK, _RM, _N}),
    _DEF: frozenset({_S, _OK, _F, _SK, _RETRY, _RM, _N}),
    _RST: frozenset({_S, _F, _SK, _N}),
    _OK: frozenset({_N, _F, _SK}),  # out of an end state: cleared, or marked otherwise by a person
    _F: frozenset({_N, _OK, _SK}),
    _SK: frozenset({_N, _OK, _F}),
    _UF: frozenset({_N, _OK, _F, _SK}),
    _RM: frozenset({_N}),
}


def is_legal(from_state: TaskState, to_state: TaskState) -> bool:
    """Return whether a task instance may go from one state to the other in one step."""
    return to_state in LEGAL_TRANSITIONS[from_state]

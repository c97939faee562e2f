"""The planner: from what ended to what happens next. Pure: no I/O, no clock, no SQL.

A `RunView` holds the states of one run's task instances and, for each task, counts of its direct upstream instances.
One change costs its out-edges, whatever the size of the run; asking whether the run is over costs nothing.

What it promises:

- *Idempotent.* A change says what the stored state of an instance now is; saying it again changes nothing.
- *Independent of order within one call.* All changes are counted before anything is decided, and tasks are decided in
  topological order, so a call gives the same plan for any order of its changes. (Between calls order can matter, as in
  Airflow: ``all_success`` with one skipped and one failed upstream follows the one accounted first.)
- *Complete.* Skips, failures and empty tasks cascade within the call; an iterative sweep, so depth does not matter.

A view is a cache. It believes its own decisions at once, so the caller must throw it away when the transaction that
applies them fails, or when ``apply()`` reports fewer changes than the plan has decisions: then load the stored states,
make a new view and call `RunView.plan_all`, and do not use ``run_state`` of the plan that went stale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from heapq import heapify, heappop, heappush
from typing import Final

from dflow.core.errors import NotFoundError
from dflow.core.graph import Graph
from dflow.core.spec import TaskSpec
from dflow.core.states import TERMINAL, Reason, RunState, TaskState
from dflow.core.trigger_rules import TRIGGER_RULES, Outcome, Upstream, evaluate

_NAMES_IN_CAUSE: Final = 5
_DECIDED: Final = {
    Outcome.RUN: (TaskState.SCHEDULED, Reason.READY),
    Outcome.SKIP: (TaskState.SKIPPED, Reason.TRIGGER_RULE),
    Outcome.UPSTREAM_FAILED: (TaskState.UPSTREAM_FAILED, Reason.TRIGGER_RULE),
}
_NOT_STARTED: Final = frozenset({TaskState.NONE, TaskState.SCHEDULED})
_BAD: Final = frozenset({TaskState.FAILED, TaskState.UPSTREAM_FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One transition the planner asks for. ``from_state`` is the fence: it holds only if the row is still there."""

    task_id: str
    map_index: int
    from_state: TaskState
    to_state: TaskState
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What follows: transitions, in topological order, and how the run ended (None: it goes on)."""

    decisions: tuple[Decision, ...] = ()
    run_state: RunState | None = None
    run_cause: str | None = None


class RunView:
    """The task instances of one run as the scheduler believes them to be.

    ``states`` are (task_id, map_index, state) of every task instance; a mapped task has several. Raises NotFoundError
    for an instance of a task the graph does not have. Memory: a few hundred bytes per instance.
    """

    __slots__ = ("_counts", "_failed_deciding", "_open", "_states", "_upstream", "_waiting", "graph")

    def __init__(self, graph: Graph, states: Iterable[tuple[str, int, TaskState]]) -> None:
        self.graph = graph
        self._states: dict[str, dict[int, TaskState]] = {task_id: {} for task_id in graph.order}
        self._waiting: dict[str, set[int]] = {task_id: set() for task_id in graph.order}
        self._upstream: dict[str, Upstream] = {task_id: Upstream() for task_id in graph.order}
        self._counts: Counter[TaskState] = Counter()
        self._open = 0  # instances that have not ended
        self._failed_deciding = 0
        for task_id, map_index, state in states:
            self._instances(task_id)[map_index] = state
        for task_id in graph.order:
            self._count_instances(task_id)

    def states(self) -> Iterator[tuple[str, int, TaskState]]:
        """Yield (task_id, map_index, state) of every instance, in topological order."""
        for task_id, instances in self._states.items():
            for map_index, state in instances.items():
                yield task_id, map_index, state

    def plan(self, changes: Iterable[tuple[str, int, TaskState]], now: datetime) -> Plan:
        """Take what happened outside and return what follows.

        ``changes`` are (task_id, map_index, the state the instance is now in), normally ends; an instance may also
        leave an end state (cleared, marked). ``now`` is the instant of the pass; no rule depends on it yet. Raises
        NotFoundError for an instance the view does not know.
        """
        touched: set[str] = set()
        for task_id, map_index, state in changes:
            touched.update(self._change(task_id, map_index, state))
        return self._settle(touched)

    def plan_all(self, now: datetime) -> Plan:
        """Evaluate every instance that waits: for a new run, and after the view was made from stored states."""
        return self._settle(self._all_waiting())

    # -- counting ------------------------------------------------------------------------------------------------

    def _instances(self, task_id: str) -> dict[int, TaskState]:
        try:
            return self._states[task_id]
        except KeyError:
            raise NotFoundError(
                f"DAG {self.graph.spec.dag_id!r} has no task {task_id!r}: the run belongs to another version of the "
                "DAG; load the version it is pinned to"
            ) from None

    def _count_instances(self, task_id: str) -> None:
        instances = self._states[task_id]
        is_setup = self.graph.tasks[task_id].is_setup
        for downstream in self.graph.downstream[task_id]:
            up = self._upstream[downstream]
            up.total += len(instances)
            up.setups += len(instances) if is_setup else 0
        for map_index, state in instances.items():
            self._count(task_id, map_index, state, 1)

    def _count(self, task_id: str, map_index: int, state: TaskState, by: int) -> None:
        """Count an instance in (by = 1) or out (by = -1) of ``state``, here and at every out-edge."""
        self._counts[state] += by
        if state is TaskState.NONE:
            (self._waiting[task_id].add if by > 0 else self._waiting[task_id].discard)(map_index)
        if state in _BAD and task_id in self.graph.deciding:
            self._failed_deciding += by
        if state in TERMINAL:
            is_setup = self.graph.tasks[task_id].is_setup
            for downstream in self.graph.downstream[task_id]:
                self._upstream[downstream].add(state, by, is_setup=is_setup)
        else:
            self._open += by

    def _change(self, task_id: str, map_index: int, state: TaskState) -> Iterable[str]:
        """Put an instance into ``state``; return the tasks whose outcome may differ now."""
        instances = self._instances(task_id)
        if map_index not in instances:
            raise NotFoundError(
                f"the run of DAG {self.graph.spec.dag_id!r} has no task instance {_name(task_id, map_index)} in this "
                "view; load its states again"
            )
        old = instances[map_index]
        if old is state:
            return ()
        self._count(task_id, map_index, old, -1)
        instances[map_index] = state
        self._count(task_id, map_index, state, 1)
        touched = self.graph.downstream[task_id] if state in TERMINAL or old in TERMINAL else ()
        return (*touched, task_id) if state is TaskState.NONE else touched

    # -- deciding ------------------------------------------------------------------------------------------------

    def _settle(self, touched: Iterable[str]) -> Plan:
        decisions: list[Decision] = []
        touched = {*touched, *self._stop_on_failure(decisions)}
        self._sweep(touched, decisions)
        if self._is_stuck():  # nothing moves and nobody will call again: look at everything before giving up
            self._sweep(self._all_waiting(), decisions)
        run_state, cause = self._end()
        return Plan(decisions=tuple(decisions), run_state=run_state, run_cause=cause)

    def _sweep(self, touched: Iterable[str], decisions: list[Decision]) -> None:
        """Decide the touched tasks and whatever that touches: in topological order, each task once."""
        position, order = self.graph.position, self.graph.order
        seen = {position[task_id] for task_id in touched}
        heap = list(seen)
        heapify(heap)
        while heap:
            for task_id in self._decide(order[heappop(heap)], decisions):
                if position[task_id] not in seen:
                    seen.add(position[task_id])
                    heappush(heap, position[task_id])

    def _decide(self, task_id: str, decisions: list[Decision]) -> set[str]:
        """Decide the waiting instances of one task; return the tasks this touches."""
        if not self._waiting[task_id]:
            return set()
        task = self.graph.tasks[task_id]
        outcome = evaluate(TRIGGER_RULES[task.trigger_rule], self._upstream[task_id])
        if outcome is Outcome.WAIT:
            return set()
        to_state, reason = _transition(task, outcome)
        touched: set[str] = set()
        for map_index in sorted(self._waiting[task_id]):
            touched.update(self._move(task_id, map_index, to_state, reason, decisions))
        return touched

    def _move(
        self, task_id: str, map_index: int, to_state: TaskState, reason: Reason, decisions: list[Decision]
    ) -> Iterable[str]:
        decisions.append(
            Decision(
                task_id=task_id,
                map_index=map_index,
                from_state=self._states[task_id][map_index],
                to_state=to_state,
                reason=reason,
            )
        )
        return self._change(task_id, map_index, to_state)

    def _stop_on_failure(self, decisions: list[Decision]) -> set[str]:
        """With ``fail_fast``, skip what has not started once a task failed; teardowns still run (Airflow).

        The view cannot tell ``scheduled`` from what the row may have become since (queued, running). Such a decision
        is stale, is not applied, and makes the caller load the view again. Nor is it told that an instance waits for
        its retry: one that has run before is skipped only if the view was loaded while it was ``scheduled`` again.
        """
        touched: set[str] = set()
        if self.graph.spec.fail_fast and self._counts[TaskState.FAILED]:
            for task_id in self.graph.order:
                if not self.graph.tasks[task_id].is_teardown:
                    for map_index in [i for i, state in self._states[task_id].items() if state in _NOT_STARTED]:
                        touched.update(
                            self._move(task_id, map_index, TaskState.SKIPPED, Reason.TRIGGER_RULE, decisions)
                        )
        return touched

    def _all_waiting(self) -> list[str]:
        return [task_id for task_id, waiting in self._waiting.items() if waiting]

    # -- the end of the run --------------------------------------------------------------------------------------

    def _is_stuck(self) -> bool:
        """Whether some instances wait and nothing is under way that could end their waiting."""
        return self._open > 0 and self._open == self._counts[TaskState.NONE]

    def _end(self) -> tuple[RunState | None, str | None]:
        """Return how the run ended: by the states of the deciding leaves, once every instance has ended (Airflow)."""
        if self._is_stuck():
            names = [_name(task_id, min(self._waiting[task_id])) for task_id in self._all_waiting()]
            return RunState.FAILED, f"deadlock: nothing runs and the trigger rules of {_list(names)} still wait"
        if self._open:
            return None, None
        return (RunState.FAILED, self._failure()) if self._failed_deciding else (RunState.SUCCESS, None)

    def _failure(self) -> str:
        failed = [_name(t, i) for t, i, state in self.states() if state is TaskState.FAILED]
        if failed:
            return f"failed: {_list(failed)}"
        blocked = [_name(t, i) for t, i, state in self.states() if state is TaskState.UPSTREAM_FAILED]
        return f"could not run: {_list(blocked)}"


def _transition(task: TaskSpec, outcome: Outcome) -> tuple[TaskState, Reason]:
    if outcome is Outcome.RUN and task.is_empty:
        return TaskState.SUCCESS, Reason.EMPTY
    return _DECIDED[outcome]


def _name(task_id: str, map_index: int) -> str:
    return task_id if map_index < 0 else f"{task_id}[{map_index}]"


def _list(names: list[str]) -> str:
    shown, more = names[:_NAMES_IN_CAUSE], len(names) - _NAMES_IN_CAUSE
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

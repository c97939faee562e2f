"""Accounts ended attempts and plans what follows, inside the scheduler's transaction.

An end is accounted exactly once: its inbox row is deleted in the transaction that plans its successors, under the lock
of its run. The planning itself is pure (`dflow.core.planner`); this file carries rows to it and its decisions back to
rows. The cost of an end is its outgoing edges, as long as the run's copy in memory is good
(`dflow.services.run_cache`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from dflow.core.graph import Graph
from dflow.core.planner import Decision, Plan
from dflow.core.states import RunState, TaskState
from dflow.services.run_cache import CachedRun, GraphCache, RunCache
from dflow.store import dags, runs
from dflow.store.apply import Change, apply
from dflow.store.engine import Tx
from dflow.store.runs import Run
from dflow.store.scheduling import End, RunToPlan

_MAX_ROUNDS: Final = 3  # how often one pass plans a run again whose copy turned out to be stale


@dataclass(slots=True)
class Accounted:
    """What was accounted and planned."""

    ends: int = 0
    ends_by_queue: Counter[str] = field(default_factory=Counter)
    planned: int = 0
    scheduled: int = 0
    ended_runs: int = 0


class Accounting:
    """Owns the copies of runs. One thread; one transaction at a time."""

    def __init__(self, actor: str) -> None:
        self._actor = actor
        self._runs = RunCache()
        self._graphs = GraphCache()
        self._uncommitted: set[int] = set()

    def begin(self) -> None:
        """A transaction begins. Copies that an earlier one changed without committing are worth nothing."""
        for run_pk in self._uncommitted:
            self._runs.drop(run_pk)
        self._uncommitted.clear()

    def committed(self) -> None:
        """The transaction has committed: the copies it changed equal the rows."""
        self._uncommitted.clear()

    def account(self, tx: Tx, with_ends: Sequence[RunToPlan], started: Sequence[Run], now: datetime) -> Accounted:
        """Plan the runs whose ends were taken and those that have just been started; all of them are locked."""
        known = {run.id for run in started}
        fresh = [_without_ends(run) for run in started]
        result = Accounted(ends=sum(len(run.ends) for run in with_ends))
        to_plan = [*fresh, *(run for run in with_ends if run.id not in known and self._is_running(run))]
        for _ in range(_MAX_ROUNDS):
            to_plan = self._plan_and_apply(tx, to_plan, result, now)
            if not to_plan:
                break
        return result

    def _is_running(self, run: RunToPlan) -> bool:
        """A run that has ended meanwhile: what trickles in late changes nothing."""
        if run.state == RunState.RUNNING:
            return True
        self._runs.drop(run.id)
        return False

    def _plan_and_apply(
        self, tx: Tx, to_plan: Sequence[RunToPlan], result: Accounted, now: datetime
    ) -> list[RunToPlan]:
        """Plan, write the decisions, end runs; return the runs that must be planned again.

        Those are the runs in which somebody (a cancel, a person) was faster than one of our decisions: our copy is
        wrong then, the rows are not.
        """
        changes: list[Change] = []
        owners: dict[int, RunToPlan] = {}  # by ti_id
        finished: list[tuple[RunToPlan, Plan]] = []
        for run in to_plan:
            self._uncommitted.add(run.id)
            cached, plan = self._plan(tx, run, now)
            result.ends_by_queue.update(_queues(cached, run.ends))
            for decision in plan.decisions:
                change = self._change(cached, decision)
                changes.append(change)
                owners[change.ti_id] = run
            if plan.run_state is not None:
                finished.append((run, plan))
        applied = apply(tx, changes)
        result.planned += len(applied)
        result.scheduled += sum(one.to_state is TaskState.SCHEDULED for one in applied)
        for one in applied:
            del owners[one.ti_id]
        stale = {run.id: run for run in owners.values()}
        for run_pk in stale:
            self._runs.drop(run_pk)
        for run, plan in finished:
            if run.id not in stale:
                assert plan.run_state is not None
                runs.end(tx, run.id, plan.run_state, plan.run_cause)  # a stopped run ends as such, whatever the plan
                self._runs.drop(run.id)
                result.ended_runs += 1
        return [replace(run, ends=[]) for run in stale.values()]

    def _plan(self, tx: Tx, run: RunToPlan, now: datetime) -> tuple[CachedRun, Plan]:
        cached = self._runs.get(run.id, run.version - 1)
        if cached is not None and all(end.ti_id in cached.keys for end in run.ends):
            plan = cached.view.plan([(*cached.keys[end.ti_id], end.state) for end in run.ends], now)
        else:
            # Read after the inbox was taken: all its ends are in these rows, and an end that came later comes again.
            cached = CachedRun.load(run.version, self._graph(tx, run.dag_version_id), _rows(tx, run.id))
            self._runs.put(run.id, cached)
            plan = cached.view.plan_all(now)
        cached.version = run.version
        return cached, plan

    def _graph(self, tx: Tx, dag_version_id: int) -> Graph:
        graph = self._graphs.get(dag_version_id)
        if graph is None:
            graph = Graph(dags.get_spec(tx, dag_version_id))
            self._graphs.put(dag_version_id, graph)
        return graph

    def _change(self, cached: CachedRun, decision: Decision) -> Change:
        return Change(
            ti_id=cached.ids[decision.task_id, decision.map_index],
            from_state=decision.from_state,
            to_state=decision.to_state,
            reason=decision.reason,
            attempt_id=None,
            actor=self._actor,
            account=False,  # the planner already knows
        )


def _without_ends(run: Run) -> RunToPlan:
    return RunToPlan(id=run.id, state=run.state, dag_version_id=run.dag_version_id, version=run.version, ends=[])


def _rows(tx: Tx, run_pk: int) -> Iterator[tuple[int, str, int, TaskState]]:
    for row in runs.load_view(tx, run_pk):
        yield row.ti_id, row.task_id, row.map_index, TaskState(row.state)


def _queues(cached: CachedRun, ends: Sequence[End]) -> Mapping[str, int]:
    tasks = cached.graph.tasks
    keys = (cached.keys.get(end.ti_id) for end in ends)
    return Counter(tasks[key[0]].queue for key in keys if key is not None and key[0] in tasks)

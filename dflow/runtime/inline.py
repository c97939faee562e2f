"""Running a whole DAG in this process, with no service at all: ``dag.test()`` and ``dflow dags test``.

The planner and the runner are those of the real thing; only what lies between them is replaced: task instances are a
dict, XComs are a dict (of the same JSON), and tasks run one after the other by priority. Limits, pools and queues do
not apply. Retries happen, but delays over a second are not waited for; the log says so.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from dflow.authoring import checks
from dflow.authoring.defaults import Defaults
from dflow.authoring.param import resolve
from dflow.core.graph import Graph
from dflow.core.ids import run_id_for
from dflow.core.planner import Decision, Plan, RunView
from dflow.core.states import Reason, RunState, RunType, TaskState
from dflow.runtime import xcom_codec
from dflow.runtime.protocol import LogLine, Outcome, Work
from dflow.runtime.runner import run_attempt

if TYPE_CHECKING:
    from dflow.authoring.dag import DAG
    from dflow.core.spec import TaskSpec
    from dflow.settings import Settings

logger = logging.getLogger("dflow.inline")

_LONGEST_WAIT_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InlineRun:
    """How an inline run ended. ``states`` and ``outcomes`` are by task id; ``xcoms`` by (task id, key), as JSON."""

    dag_id: str
    run_id: str
    state: RunState
    cause: str | None
    states: Mapping[str, TaskState]
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)  # of the last attempt; empty tasks have none
    xcoms: Mapping[tuple[str, str], Any] = field(default_factory=dict)

    def xcom(self, task_id: str, key: str = "return_value") -> Any:
        """Return what a task returned or pushed; None when there is nothing."""
        return xcom_codec.decode(self.xcoms.get((task_id, key)))


def run_dag(
    dag: DAG,
    conf: Mapping[str, Any] | None = None,
    logical_date: datetime | None = None,
    run_id: str | None = None,
    *,
    run_after: datetime | None = None,
    settings: Settings | None = None,
) -> InlineRun:
    """Run the DAG to its end and return how it ended; a failed run is a result, not an error.

    Parameters:
        conf: the run's conf; must be JSON and fit the params.
        logical_date: aware; by default now, so that ``ds`` and the like exist.
        run_id: by default ``manual__<now>``.
        run_after: aware; by default the logical date.
        settings: by default those of this environment.

    Raises `DagDefinitionError` for a DAG that cannot work, `ParamValidationError` for a conf that does not fit.
    """
    if settings is None:
        from dflow.settings import load

        settings = load()
    given = checks.json_value(dict(conf or {}), "the conf of the run")
    spec = dag.to_spec(Defaults.from_settings(settings))
    if settings.core.dag_run_conf_overrides_params:
        resolve(spec.params, given)
    run = _InlineRun(dag, Graph(spec), given, _Dates.of(logical_date, run_after), run_id, settings)
    with _task_logs(settings.logging.logging_level):
        return run.to_end()


@dataclass(frozen=True, slots=True)
class _Dates:
    """The instants of a run."""

    logical_date: datetime
    run_after: datetime

    @classmethod
    def of(cls, logical_date: datetime | None, run_after: datetime | None) -> _Dates:
        logical = checks.utc(checks.instant(logical_date, "logical_date")) or datetime.now(UTC)
        return cls(logical, checks.utc(checks.instant(run_after, "run_after")) or logical)


class _InlineRun:
    """The run under way."""

    def __init__(
        self, dag: DAG, graph: Graph, conf: dict[str, Any], dates: _Dates, run_id: str | None, settings: Settings
    ) -> None:
        self._dag, self._graph, self._conf, self._dates, self._settings = dag, graph, conf, dates, settings
        self._run_id = run_id or run_id_for(RunType.MANUAL, dates.run_after)
        self._started_at = datetime.now(UTC)
        self._states: dict[str, TaskState] = dict.fromkeys(graph.order, TaskState.NONE)
        self._ready: list[str] = []
        self._outcomes: dict[str, Outcome] = {}
        self._xcoms: dict[tuple[str, str], Any] = {}
        self._place = {task_id: place for place, task_id in enumerate(graph.order)}

    def to_end(self) -> InlineRun:
        """Plan and run until the planner says that the run has ended."""
        view = RunView(self._graph, [(task_id, -1, state) for task_id, state in self._states.items()])
        logger.info("run %s of %s begins", self._run_id, self._dag.dag_id)
        plan = view.plan_all(datetime.now(UTC))
        self._apply(plan)
        while plan.run_state is None:
            task_id = self._next()
            if task_id is None:
                break
            self._states[task_id] = self._run_task(self._graph.tasks[task_id])
            plan = view.plan([(task_id, -1, self._states[task_id])], datetime.now(UTC))
            self._apply(plan)
        return self._result(plan)

    def _apply(self, plan: Plan) -> None:
        for decision in plan.decisions:
            self._states[decision.task_id] = decision.to_state
            if decision.to_state is TaskState.SCHEDULED:
                self._ready.append(decision.task_id)
            else:
                _report(decision)

    def _next(self) -> str | None:
        """Return the ready task of the highest priority, the first in the graph's order among equals."""
        self._ready = [task_id for task_id in self._ready if self._states[task_id] is TaskState.SCHEDULED]
        if not self._ready:
            return None
        best = min(self._ready, key=lambda t: (-self._graph.tasks[t].effective_priority, self._place[t]))
        self._ready.remove(best)
        return best

    def _run_task(self, task: TaskSpec) -> TaskState:
        """Run a task with its retries and return the state it ends in."""
        tries = 0
        while True:
            outcome = self._attempt(task, tries)
            tries += 1
            self._outcomes[task.task_id] = outcome
            if outcome.reason is Reason.SUCCEEDED:
                return self._ended(task, TaskState.SUCCESS, outcome)
            if outcome.reason is Reason.SKIP_RAISED:
                return self._ended(task, TaskState.SKIPPED, outcome)
            if outcome.retry_delay_seconds is None:
                return self._ended(task, TaskState.FAILED, outcome)
            self._wait(task, outcome.retry_delay_seconds)

    def _attempt(self, task: TaskSpec, failures: int) -> Outcome:
        logger.info("%s: try %s of %s", task.task_id, failures + 1, task.retries + 1)
        for key in [key for key in self._xcoms if key[0] == task.task_id]:
            del self._xcoms[key]  # a new attempt starts without the XComs of the last one
        client = _MemoryClient(task.task_id, self._run_id, self._xcoms, self._states)
        outcome = run_attempt(self._work(task, failures), self._dag, client, settings=self._settings)
        if outcome.reason is Reason.RAISED and (outcome.cause or "").startswith("KeyboardInterrupt"):
            raise KeyboardInterrupt  # Ctrl-C is meant for the run, not only for the task
        for name, value in outcome.xcoms.items():
            client.push_xcom(name, value)
        return outcome

    def _ended(self, task: TaskSpec, state: TaskState, outcome: Outcome) -> TaskState:
        level = logging.ERROR if state is TaskState.FAILED else logging.INFO
        logger.log(level, "%s: %s%s", task.task_id, state, f" ({outcome.cause})" if outcome.cause else "")
        return state

    def _wait(self, task: TaskSpec, seconds: float) -> None:
        if seconds <= _LONGEST_WAIT_SECONDS:
            time.sleep(seconds)
        else:
            logger.info("%s: tried again at once; a real run waits %g s here", task.task_id, seconds)

    def _work(self, task: TaskSpec, failures: int) -> Work:
        return Work(
            ti_id=self._place[task.task_id] + 1,
            attempt_id=str(uuid.uuid4()),
            run_pk=0,
            dag_id=self._dag.dag_id,
            run_id=self._run_id,
            task_id=task.task_id,
            map_index=-1,
            try_number=failures + 1,
            user_failures=failures,
            retries=task.retries,
            run_type=RunType.MANUAL.value,
            logical_date=self._dates.logical_date,
            data_interval_start=self._dates.logical_date,
            data_interval_end=self._dates.logical_date,
            run_after=self._dates.run_after,
            run_started_at=self._started_at,
            conf=self._conf,
            bundle_hash="",
            path=os.path.basename(self._dag.fileloc),
            queue=task.queue,
            pool=task.pool,
            priority_weight=task.effective_priority,
            hostname=socket.gethostname(),
            started_at=datetime.now(UTC),
        )

    def _result(self, plan: Plan) -> InlineRun:
        state = plan.run_state or RunState.FAILED
        cause = plan.run_cause or (None if plan.run_state else "the planner left tasks that can never run")
        logger.info("run %s of %s: %s%s", self._run_id, self._dag.dag_id, state, f" ({cause})" if cause else "")
        return InlineRun(
            dag_id=self._dag.dag_id,
            run_id=self._run_id,
            state=state,
            cause=cause,
            states=dict(self._states),
            outcomes=dict(self._outcomes),
            xcoms=dict(self._xcoms),
        )


class _MemoryClient:
    """An `AttemptClient` over dicts."""

    def __init__(
        self, task_id: str, run_id: str, xcoms: dict[tuple[str, str], Any], states: Mapping[str, TaskState]
    ) -> None:
        self._task_id, self._run_id, self._xcoms, self._states = task_id, run_id, xcoms, states

    def push_xcom(self, key: str, value: Any) -> None:
        """Keep a JSON value."""
        self._xcoms[self._task_id, key] = value

    def pull_xcoms(
        self,
        *,
        task_ids: Sequence[str] | None,
        key: str,
        map_indexes: Sequence[int] | None = None,
        dag_id: str | None = None,
        run_id: str | None = None,
        include_prior_dates: bool = False,
    ) -> list[tuple[str, int, Any]]:
        """Return values of this run; other runs do not exist here."""
        if run_id not in (None, self._run_id) or (map_indexes is not None and -1 not in map_indexes):
            return []
        return [
            (task_id, -1, value)
            for (task_id, name), value in sorted(self._xcoms.items())
            if name == key and (task_ids is None or task_id in task_ids)
        ]

    def task_states(self, task_ids: Sequence[str]) -> dict[str, str]:
        """Return the states of tasks of the run."""
        return {task_id: self._states[task_id].value for task_id in task_ids if task_id in self._states}

    def log(self, lines: Sequence[LogLine]) -> None:
        """Show lines on stderr."""
        for line in lines:
            logging.getLogger(line.source).log(logging.getLevelNamesMapping().get(line.level, 20), "%s", line.text)


def _report(decision: Decision) -> None:
    logger.info("%s: %s (%s)", decision.task_id, decision.to_state, decision.reason)


@contextmanager
def _task_logs(level: str) -> Iterator[None]:
    """Show what is logged on stderr inside the block."""
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)

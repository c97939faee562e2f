"""The planner case by case: what it decides, when a run ends and why, and what a change costs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from dflow.core import planner
from dflow.core.errors import NotFoundError
from dflow.core.graph import Graph
from dflow.core.planner import Decision, Plan, RunView
from dflow.core.spec import DagSpec, TaskSpec
from dflow.core.states import Reason, RunState, TaskState
from dflow.core.trigger_rules import Outcome

NOW = datetime(2026, 11, 22, tzinfo=UTC)
NONE, SCHEDULED, SUCCESS, FAILED, SKIPPED = (
    TaskState.NONE,
    TaskState.SCHEDULED,
    TaskState.SUCCESS,
    TaskState.FAILED,
    TaskState.SKIPPED,
)


def task(task_id: str, upstream: str = "", **more: Any) -> TaskSpec:
    return TaskSpec(task_id=task_id, operator="X", upstream=tuple(upstream.split()), **more)


def view_of(*tasks: TaskSpec, mapped: dict[str, int] | None = None, **more: Any) -> RunView:
    spec = DagSpec(dag_id="d", tasks=tasks, **more)
    states = [
        (t.task_id, index, NONE)
        for t in tasks
        for index in (range(mapped[t.task_id]) if t.task_id in (mapped or {}) else [-1])
    ]
    return RunView(Graph(spec), states)


def moves(plan: Plan) -> dict[str, str]:
    return {
        d.task_id if d.map_index < 0 else f"{d.task_id}[{d.map_index}]": f"{d.to_state}/{d.reason}"
        for d in plan.decisions
    }


def test_a_new_run_schedules_its_roots() -> None:
    plan = view_of(task("a"), task("b"), task("c", "a b")).plan_all(NOW)
    assert plan.decisions[0] == Decision(
        task_id="a", map_index=-1, from_state=NONE, to_state=SCHEDULED, reason=Reason.READY
    )
    assert moves(plan) == {"a": "scheduled/ready", "b": "scheduled/ready"}
    assert plan.run_state is None


def test_a_chain_goes_on_step_by_step_and_ends() -> None:
    view = view_of(task("a"), task("b", "a"))
    view.plan_all(NOW)
    assert moves(view.plan([("a", -1, SUCCESS)], NOW)) == {"b": "scheduled/ready"}
    assert view.plan([("b", -1, SUCCESS)], NOW) == Plan(run_state=RunState.SUCCESS)


def test_a_change_told_twice_changes_nothing() -> None:
    view = view_of(task("a"), task("b", "a"))
    view.plan_all(NOW)
    assert view.plan([("a", -1, SUCCESS), ("a", -1, SUCCESS)], NOW).decisions
    assert view.plan([("a", -1, SUCCESS)], NOW) == Plan()


def test_failures_and_skips_cascade_in_one_call() -> None:
    view = view_of(task("a"), task("b", "a"), task("c", "b"), task("d", "c", trigger_rule="all_done"))
    view.plan_all(NOW)
    plan = view.plan([("a", -1, FAILED)], NOW)
    assert moves(plan) == {
        "b": "upstream_failed/trigger_rule",
        "c": "upstream_failed/trigger_rule",
        "d": "scheduled/ready",
    }
    assert view.plan([("d", -1, SUCCESS)], NOW).run_state is RunState.SUCCESS  # the leaf decides


def test_empty_tasks_are_done_at_once_and_cascade() -> None:
    view = view_of(
        task("a", is_empty=True), task("b", "a", is_empty=True), task("c", "b"), task("d", "b", is_empty=True)
    )
    assert moves(view.plan_all(NOW)) == {
        "a": "success/empty",
        "b": "success/empty",
        "c": "scheduled/ready",
        "d": "success/empty",
    }


def test_runs_of_nothing_but_empty_tasks_and_of_no_task_end_at_once() -> None:
    assert view_of(task("a", is_empty=True)).plan_all(NOW).run_state is RunState.SUCCESS
    assert view_of().plan_all(NOW) == Plan(run_state=RunState.SUCCESS)


def test_a_failed_run_says_which_tasks_failed() -> None:
    view = view_of(*(task(f"t{n}") for n in range(7)), task("z", "t0"))
    view.plan_all(NOW)
    plan = view.plan([(f"t{n}", -1, FAILED) for n in range(7)], NOW)
    assert plan.run_state is RunState.FAILED
    assert plan.run_cause == "failed: t0, t1, t2, t3, t4 and 2 more"


def test_a_run_can_fail_without_a_failed_task() -> None:
    view = view_of(task("a"), task("b", "a", trigger_rule="all_done_min_one_success"), task("c", "a"))
    view.plan_all(NOW)
    view = view_of(task("a"), task("b"), task("c", "a b", trigger_rule="one_success"))
    view.plan_all(NOW)
    plan = view.plan([("a", -1, SKIPPED), ("b", -1, TaskState.REMOVED)], NOW)
    assert (plan.run_state, plan.run_cause) == (RunState.FAILED, "could not run: c")


def test_a_failed_teardown_does_not_fail_the_run() -> None:
    def end(**more: Any) -> RunState | None:
        view = view_of(task("work"), task("down", "work", is_teardown=True, trigger_rule="all_done", **more))
        view.plan_all(NOW)
        view.plan([("work", -1, SUCCESS)], NOW)
        return view.plan([("down", -1, FAILED)], NOW).run_state

    assert end() is RunState.SUCCESS
    assert end(on_failure_fail_dagrun=True) is RunState.FAILED


def test_mapped_instances_count_one_by_one() -> None:
    view = view_of(task("m"), task("sum", "m"), mapped={"m": 3})
    assert moves(view.plan_all(NOW)) == dict.fromkeys(["m[0]", "m[1]", "m[2]"], "scheduled/ready")
    assert not view.plan([("m", 0, SUCCESS), ("m", 2, SUCCESS)], NOW).decisions
    assert moves(view.plan([("m", 1, SUCCESS)], NOW)) == {"sum": "scheduled/ready"}


def test_all_instances_of_a_mapped_task_follow_their_upstream() -> None:
    view = view_of(task("a"), task("m", "a"), task("z", "m"), mapped={"m": 2})
    view.plan_all(NOW)
    plan = view.plan([("a", -1, FAILED)], NOW)
    assert set(moves(plan)) == {"m[0]", "m[1]", "z"}
    assert plan.run_cause == "failed: a"


def test_the_order_of_changes_within_a_call_does_not_matter() -> None:
    for changes in ([("a", -1, SKIPPED), ("b", -1, FAILED)], [("b", -1, FAILED), ("a", -1, SKIPPED)]):
        view = view_of(task("a"), task("b"), task("c", "a b"))
        view.plan_all(NOW)
        assert moves(view.plan(changes, NOW)) == {"c": "upstream_failed/trigger_rule"}


def test_upstream_is_decided_first_even_if_it_comes_later_in_the_alphabet() -> None:
    view = view_of(
        task("x"), task("m", "x", trigger_rule="one_failed", is_empty=True), task("a", "m x", trigger_rule="all_done")
    )
    view.plan_all(NOW)
    plan = view.plan([("x", -1, SUCCESS)], NOW)
    assert [d.task_id for d in plan.decisions] == ["m", "a"]


def test_cleared_tasks_run_again() -> None:
    view = view_of(task("a"), task("b", "a"))
    view.plan_all(NOW)
    view.plan([("a", -1, FAILED)], NOW)
    assert moves(view.plan([("a", -1, NONE), ("b", -1, NONE)], NOW)) == {"a": "scheduled/ready"}
    assert moves(view.plan([("a", -1, SUCCESS)], NOW)) == {"b": "scheduled/ready"}


def test_a_task_marked_after_its_end_counts_as_marked() -> None:
    view = view_of(task("a"), task("b", "a"))
    view.plan_all(NOW)
    view.plan([("a", -1, FAILED)], NOW)
    plan = view.plan([("a", -1, SUCCESS), ("b", -1, NONE)], NOW)
    assert moves(plan) == {"b": "scheduled/ready"}


def test_fail_fast_skips_what_has_not_started_but_teardowns() -> None:
    tasks = (task("a"), task("b"), task("c", "b"), task("down", "c", is_teardown=True, trigger_rule="all_done"))
    view = view_of(*tasks, fail_fast=True)
    view.plan_all(NOW)
    plan = view.plan([("a", -1, FAILED)], NOW)
    assert moves(plan) == {"b": "skipped/trigger_rule", "c": "skipped/trigger_rule", "down": "scheduled/ready"}
    assert next(d for d in plan.decisions if d.task_id == "b").from_state is SCHEDULED
    assert view.plan([("down", -1, SUCCESS)], NOW).run_state is RunState.FAILED


def test_fail_fast_leaves_what_runs_alone() -> None:
    spec = DagSpec(dag_id="d", tasks=(task("a"), task("b"), task("c", "b")), fail_fast=True)
    view = RunView(Graph(spec), [("a", -1, FAILED), ("b", -1, TaskState.RUNNING), ("c", -1, NONE)])
    assert moves(view.plan_all(NOW)) == {"c": "skipped/trigger_rule"}
    assert view.plan([("b", -1, SUCCESS)], NOW).run_state is RunState.FAILED


def test_a_view_never_told_to_plan_all_still_starts() -> None:
    assert moves(view_of(task("a")).plan([], NOW)) == {"a": "scheduled/ready"}


def test_a_deadlock_ends_the_run_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule waits for ever today (see test_trigger_rules); should one do so, the run does not hang."""
    monkeypatch.setitem(planner.TRIGGER_RULES, "all_done", lambda up: Outcome.WAIT)
    view = view_of(task("a"), task("b", "a", trigger_rule="all_done"))
    view.plan_all(NOW)
    plan = view.plan([("a", -1, SUCCESS)], NOW)
    assert plan.run_state is RunState.FAILED
    assert plan.run_cause == "deadlock: nothing runs and the trigger rules of b still wait"


def test_instances_the_view_does_not_know_are_refused() -> None:
    graph = Graph(DagSpec(dag_id="d", tasks=(task("a"),)))
    with pytest.raises(NotFoundError, match="no task 'b'"):
        RunView(graph, [("b", -1, NONE)])
    view = RunView(graph, [("a", -1, NONE)])
    with pytest.raises(NotFoundError, match=r"a\[3\] in this view"):
        view.plan([("a", 3, SUCCESS)], NOW)
    with pytest.raises(NotFoundError, match="no task 'c'"):
        view.plan([("c", -1, SUCCESS)], NOW)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trigger rules evaluated so far."""
    seen: list[Any] = []
    real = planner.evaluate

    def counting(rule: Any, up: Any) -> Outcome:
        seen.append(up)
        return real(rule, up)

    monkeypatch.setattr(planner, "evaluate", counting)
    return seen


def test_one_end_costs_its_out_edges(evaluations: list[Any]) -> None:
    """1 >> 500 >> 1: an end in the middle looks at one task, the first at 500, in a run of any size."""
    middle = [task(f"m{n:03}", "a") for n in range(500)]
    view = view_of(task("a"), *middle, task("z", " ".join(t.task_id for t in middle)))
    view.plan_all(NOW)
    evaluations.clear()
    view.plan([("a", -1, SUCCESS)], NOW)
    assert len(evaluations) == 500
    evaluations.clear()
    for t in middle[:-1]:
        assert view.plan([(t.task_id, -1, SUCCESS)], NOW) == Plan()
    assert len(evaluations) == 499
    assert moves(view.plan([(middle[-1].task_id, -1, SUCCESS)], NOW)) == {"z": "scheduled/ready"}


def test_a_cascade_through_ten_thousand_tasks() -> None:
    names = [f"t{n:05}" for n in range(10_000)]
    view = view_of(task(names[0]), *(task(name, before) for before, name in zip(names, names[1:], strict=False)))
    view.plan_all(NOW)
    plan = view.plan([(names[0], -1, FAILED)], NOW)
    assert [d.task_id for d in plan.decisions] == names[1:]
    assert plan.run_state is RunState.FAILED

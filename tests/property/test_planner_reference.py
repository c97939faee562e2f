"""The incremental planner and the plain reference model agree on every step of every run."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from dflow.core.graph import Graph
from dflow.core.planner import Plan, RunView
from dflow.core.states import LEGAL_TRANSITIONS, TaskState
from tests.property import reference_planner as reference
from tests.property.strategies import dags

NOW = datetime(2026, 11, 22, tzinfo=UTC)
ENDS = [TaskState.SUCCESS, TaskState.SUCCESS, TaskState.FAILED, TaskState.SKIPPED]


def states_of(view: RunView) -> reference.Run:
    return {(task_id, map_index): state.value for task_id, map_index, state in view.states()}


def check(view: RunView, plan: Plan, before: reference.Run, expected: reference.Run) -> None:
    """The plan leads from ``before`` to ``expected`` in legal steps and says how the run ended."""
    after = dict(before)
    for decision in plan.decisions:
        key = decision.task_id, decision.map_index
        assert after[key] == decision.from_state
        assert decision.to_state in LEGAL_TRANSITIONS[decision.from_state]
        after[key] = decision.to_state.value
    assert after == states_of(view) == expected
    end = reference.run_end(view.graph.spec, expected)
    assert (plan.run_state.value if plan.run_state else None) == end
    assert (plan.run_cause is not None) == (end == "failed")


@settings(max_examples=250, deadline=None)
@given(data=st.data(), spec=dags(), sizes=st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_every_step_equals_the_reference(data: st.DataObject, spec, sizes) -> None:
    graph = Graph(spec)
    keys = [(t.task_id, i if n > 1 else -1) for t, n in zip(spec.tasks, sizes, strict=False) for i in range(n)]
    view = RunView(graph, [(*key, TaskState.NONE) for key in keys])
    before: reference.Run = dict.fromkeys(keys, "none")
    expected = reference.settle(spec, before)
    check(view, view.plan_all(NOW), before, expected)

    for _ in range(30):
        in_flight = sorted(key for key, state in expected.items() if state not in reference.ENDED | {"none"})
        ended = sorted(key for key, state in expected.items() if state in reference.ENDED)
        if not in_flight:
            break
        changed = data.draw(st.lists(st.sampled_from(in_flight), min_size=1, max_size=3, unique=True))
        changes = {key: data.draw(st.sampled_from(ENDS)) for key in changed}
        if ended and data.draw(st.integers(0, 5)) == 0:  # somebody clears or removes an instance
            changes[data.draw(st.sampled_from(ended))] = data.draw(st.sampled_from([TaskState.NONE, TaskState.REMOVED]))
        repeated = data.draw(st.permutations([*changes, *data.draw(st.lists(st.sampled_from(sorted(changes))))]))

        before = {**expected, **{key: state.value for key, state in changes.items()}}
        expected = reference.settle(spec, before)
        plan = view.plan([(*key, changes[key]) for key in repeated], NOW)
        check(view, plan, before, expected)
        assert view.plan([(*key, TaskState(expected[key])) for key in repeated], NOW).decisions == ()
        assert RunView(graph, view.states()).plan_all(NOW).decisions == ()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), spec=dags())
def test_a_view_loaded_at_any_moment_plans_what_is_missing(data: st.DataObject, spec) -> None:
    """A scheduler that died between an end and its accounting is replaced by one that knows only the rows."""
    stored = {(task.task_id, -1): data.draw(st.sampled_from(list(TaskState))).value for task in spec.tasks}
    view = RunView(Graph(spec), [(*key, TaskState(state)) for key, state in stored.items()])
    check(view, view.plan_all(NOW), stored, reference.settle(spec, stored))

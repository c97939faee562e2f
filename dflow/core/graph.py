"""The shape of a DAG: who waits for whom, in which order, and what a task's place adds to its priority.

A `Graph` is built once per DAG version and shared by all its runs; it is read-only. Nothing here recurses, so a chain
of ten thousand tasks is as good as any.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Final

from dflow.core.errors import DagCycleError, DagDefinitionError, DuplicateTaskIdError
from dflow.core.spec import DagSpec, TaskSpec
from dflow.core.trigger_rules import rule_for

INT32_MIN: Final = -(2**31)
INT32_MAX: Final = 2**31 - 1
WEIGHT_RULES: Final = ("downstream", "upstream", "absolute")


class Graph:
    """The tasks of one DAG and their edges.

    Attributes: ``spec``; ``tasks`` by id; ``upstream`` and ``downstream``, the direct neighbours by id, sorted;
    ``roots`` (no upstream) and ``leaves`` (no downstream), sorted; ``order``, all ids with upstream first, the same
    for the same tasks and edges; ``position`` of each id in it; ``deciding``, the ids whose end states decide how the
    run ended: the leaves, teardowns aside.

    Raises DuplicateTaskIdError, DagCycleError (with the circle), DagDefinitionError for an upstream id or a trigger
    rule that does not exist.
    """

    __slots__ = ("deciding", "downstream", "leaves", "order", "position", "roots", "spec", "tasks", "upstream")

    def __init__(self, spec: DagSpec) -> None:
        self.spec = spec
        self.tasks: dict[str, TaskSpec] = _by_id(spec)
        self.upstream: dict[str, tuple[str, ...]] = {
            task.task_id: _known_upstream(spec.dag_id, task, self.tasks) for task in self.tasks.values()
        }
        self.downstream: dict[str, tuple[str, ...]] = _reversed(self.upstream)
        self.roots: tuple[str, ...] = tuple(sorted(t for t, up in self.upstream.items() if not up))
        self.leaves: tuple[str, ...] = tuple(sorted(t for t, down in self.downstream.items() if not down))
        self.order: tuple[str, ...] = _topological(spec.dag_id, self.upstream)
        self.position: dict[str, int] = {task_id: place for place, task_id in enumerate(self.order)}
        self.deciding: frozenset[str] = _deciding(self.tasks, self.downstream) or frozenset(self.leaves)
        for task in self.tasks.values():
            rule_for(task.trigger_rule)


def _by_id(spec: DagSpec) -> dict[str, TaskSpec]:
    tasks: dict[str, TaskSpec] = {}
    for task in spec.tasks:
        if task.task_id in tasks:
            raise DuplicateTaskIdError(f"DAG {spec.dag_id!r} has two tasks {task.task_id!r}; rename one of them")
        tasks[task.task_id] = task
    return tasks


def _known_upstream(dag_id: str, task: TaskSpec, tasks: Mapping[str, TaskSpec]) -> tuple[str, ...]:
    for upstream in task.upstream:
        if upstream not in tasks:
            near = difflib.get_close_matches(upstream, tasks, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "add that task to the DAG or drop the dependency."
            raise DagDefinitionError(
                f"task {task.task_id!r} of DAG {dag_id!r} depends on {upstream!r}, which is not in the DAG; {hint}"
            )
    return tuple(sorted(set(task.upstream)))


def _reversed(edges: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    turned: dict[str, list[str]] = {node: [] for node in edges}
    for node in sorted(edges):
        for other in edges[node]:
            turned[other].append(node)
    return {node: tuple(others) for node, others in turned.items()}


def _topological(dag_id: str, upstream: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    sorter = TopologicalSorter({task_id: upstream[task_id] for task_id in sorted(upstream)})
    try:
        return tuple(sorter.static_order())
    except CycleError as error:
        circle = " >> ".join(error.args[1])
        raise DagCycleError(f"DAG {dag_id!r} has a circle: {circle}; remove one of these dependencies") from None


def _deciding(tasks: Mapping[str, TaskSpec], downstream: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """Return the leaves that count: teardowns do not, unless ``on_failure_fail_dagrun``; a task followed by nothing
    but such teardowns is a leaf (Airflow: ``DagRun._tis_for_dagrun_state``).
    """
    ignored = {t for t, task in tasks.items() if task.is_teardown and not task.on_failure_fail_dagrun}
    return frozenset(t for t in tasks if t not in ignored and ignored.issuperset(downstream[t]))


def effective_priorities(spec: DagSpec) -> dict[str, int]:
    """Return for each task its priority as admission sorts by it, clamped to a 32-bit integer.

    ``weight_rule`` of the task says what is added to its own ``priority_weight``: ``downstream`` the weights of all
    tasks that (also indirectly) follow it, each once; ``upstream`` of all it follows; ``absolute`` nothing (Airflow).
    Raises DagDefinitionError for another rule.
    """
    graph = Graph(spec)
    for task in spec.tasks:
        if task.weight_rule not in WEIGHT_RULES:
            near = difflib.get_close_matches(task.weight_rule, WEIGHT_RULES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(WEIGHT_RULES)}."
            raise DagDefinitionError(f"task {task.task_id!r} has unknown weight_rule {task.weight_rule!r}; {hint}")
    used = {task.weight_rule for task in spec.tasks}
    added = {"absolute": dict.fromkeys(graph.tasks, 0)}
    if "downstream" in used:
        added["downstream"] = _reachable_weights(graph, reversed(graph.order), graph.downstream)
    if "upstream" in used:
        added["upstream"] = _reachable_weights(graph, graph.order, graph.upstream)
    return {t: _clamp(task.priority_weight + added[task.weight_rule][t]) for t, task in graph.tasks.items()}


def _reachable_weights(graph: Graph, order: Iterable[str], neighbours: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the summed weight of everything reachable. Sets of tasks are bits of one integer, and weights are summed
    binary digit by digit, so that thousands of tasks with arbitrary weights cost a few thousand big-integer steps.
    """
    bit = {task_id: 1 << place for task_id, place in graph.position.items()}
    digits = _weight_digits(graph, bit)
    reach: dict[str, int] = {}
    sums: dict[str, int] = {}
    for task_id in order:
        seen = 0
        for other in neighbours[task_id]:
            seen |= bit[other] | reach[other]
        reach[task_id] = seen
        sums[task_id] = sum(value * (seen & members).bit_count() for value, members in digits.items())
    return sums


def _weight_digits(graph: Graph, bit: Mapping[str, int]) -> dict[int, int]:
    """Return for each signed power of two the set of tasks whose weight has that binary digit."""
    digits: dict[int, int] = {}
    for task_id, task in graph.tasks.items():
        sign = -1 if task.priority_weight < 0 else 1
        rest = abs(task.priority_weight)
        while rest:
            low = rest & -rest
            digits[sign * low] = digits.get(sign * low, 0) | bit[task_id]
            rest ^= low
    return digits


def _clamp(weight: int) -> int:
    return min(max(weight, INT32_MIN), INT32_MAX)

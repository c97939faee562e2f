"""What can stand on either side of ``>>``: operators, task results, task groups, edge labels, and lists of them.

Relations are set when the arrow is executed: a group passes them on to the tasks it has at that moment, its roots for
what comes before and its leaves for what comes after (Airflow's rule), so draw arrows to a group after its block.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dflow.authoring.refusal import refusal, user_location

if TYPE_CHECKING:
    from dflow.authoring.operator import BaseOperator

logger = logging.getLogger(__name__)


class Node(ABC):
    """Something with an upstream and a downstream side."""

    __slots__ = ()

    @property
    @abstractmethod
    def roots(self) -> Sequence[BaseOperator]:
        """The tasks that an upstream relation reaches."""

    @property
    @abstractmethod
    def leaves(self) -> Sequence[BaseOperator]:
        """The tasks that a downstream relation leaves from."""

    def set_upstream(self, task_or_task_list: Any, edge_modifier: Any = None) -> None:
        """Make the given task, group or list of them run before this one. Same as ``self << other``."""
        for other in nodes(task_or_task_list):
            connect(other, self, label=_label(edge_modifier))

    def set_downstream(self, task_or_task_list: Any, edge_modifier: Any = None) -> None:
        """Make the given task, group or list of them run after this one. Same as ``self >> other``."""
        for other in nodes(task_or_task_list):
            connect(self, other, label=_label(edge_modifier))

    def _linked_from(self, upstream: Node) -> bool:
        """Take an edge from ``upstream`` in one's own way; labels do."""
        return False

    def _linked_to(self, downstream: Node) -> bool:
        """Take an edge to ``downstream`` in one's own way; labels do."""
        return False

    def __rshift__(self, other: Any) -> Any:
        self.set_downstream(other)
        return other

    def __lshift__(self, other: Any) -> Any:
        self.set_upstream(other)
        return other

    def __rrshift__(self, other: Any) -> Node:  # [a, b] >> self
        self.set_upstream(other)
        return self

    def __rlshift__(self, other: Any) -> Node:  # [a, b] << self
        self.set_downstream(other)
        return self


def nodes(value: Any) -> list[Node]:
    """Return the nodes in ``value``: one node, or a list, tuple or set of them, however deep."""
    if isinstance(value, Node):
        return [value]
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | dict):
        return [node for item in value for node in nodes(item)]
    hint = "; call it first: f() >> ..." if callable(value) else ""
    raise refusal(
        f"relations can be set between tasks, task groups, task results and labels, not {type(value).__name__} "
        f"{value!r}{hint}"
    )


def connect(upstream: Node, downstream: Node, *, label: str | None = None) -> None:
    """Draw the edges from the leaves of ``upstream`` to the roots of ``downstream``."""
    if upstream._linked_to(downstream) or downstream._linked_from(upstream):
        return
    leaves, roots = list(upstream.leaves), list(downstream.roots)
    for node, tasks in ((upstream, leaves), (downstream, roots)):
        if not tasks:
            logger.warning("%s: %r has no tasks yet, so this relation has no effect", user_location(), node)
    for up in leaves:
        for down in roots:
            connect_tasks(up, down, label=label)


def connect_tasks(up: BaseOperator, down: BaseOperator, *, label: str | None = None) -> None:
    """Draw one edge; an operator that has no DAG yet joins the DAG of the other one."""
    if up is down:
        raise refusal(f"task {up.task_id!r} cannot depend on itself")
    dag = up._dag or down._dag
    if dag is None:
        raise refusal(
            f"tasks {up.task_id!r} and {down.task_id!r} have no DAG yet; create at least one of them inside "
            "`with DAG(...)` or give it dag=..."
        )
    for op in (up, down):
        if op._dag is None:
            dag.add_task(op)
        elif op._dag is not dag:
            raise refusal(
                f"cannot set a relation between tasks of different DAGs: {up.dag_id}.{up.task_id} and "
                f"{down.dag_id}.{down.task_id}"
            )
    up.downstream_task_ids.add(down.task_id)
    down.upstream_task_ids.add(up.task_id)
    if label is not None:
        dag.edge_labels[up.task_id, down.task_id] = label


def _label(edge_modifier: Any) -> str | None:
    return None if edge_modifier is None else edge_modifier.label

"""Labels on edges, and the helpers that draw many edges at once: chain, chain_linear, cross_downstream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dflow.authoring.node import Node, connect, nodes
from dflow.authoring.refusal import refusal

if TYPE_CHECKING:
    from dflow.authoring.operator import BaseOperator


class EdgeModifier(Node):
    """A label between two nodes: ``check >> Label("empty") >> stop``. It is not a node of the graph itself."""

    def __init__(self, label: str | None = None) -> None:
        self.label = label
        self._upstream: list[Node] = []
        self._downstream: list[Node] = []

    @property
    def roots(self) -> Sequence[BaseOperator]:
        """What a chain onto the label reaches: the tasks after it."""
        return [task for node in self._downstream for task in node.roots]

    @property
    def leaves(self) -> Sequence[BaseOperator]:
        """What a chain from the label leaves from: the tasks before it."""
        return [task for node in self._upstream for task in node.leaves]

    def _linked_from(self, upstream: Node) -> bool:
        self._upstream.append(upstream)
        for downstream in self._downstream:
            connect(upstream, downstream, label=self.label)
        return True

    def _linked_to(self, downstream: Node) -> bool:
        if isinstance(downstream, EdgeModifier):
            raise refusal("two labels follow each other; an edge takes one label")
        self._downstream.append(downstream)
        for upstream in self._upstream:
            connect(upstream, downstream, label=self.label)
        return True


def Label(label: str) -> EdgeModifier:  # noqa: N802, RUF100 -- Airflow's name
    """Return a label for the edges it is put on: ``a >> Label("no rows") >> b``."""
    if not isinstance(label, str):
        raise refusal(f"a label must be a string, not {type(label).__name__}")
    return EdgeModifier(label)


def chain(*tasks: Any) -> None:
    """Draw ``tasks[0] >> tasks[1] >> ...``; two neighbouring lists are joined pairwise and must have equal length.

    Example: ``chain(a, [b, c], [d, e], f)`` is ``a >> [b, c]; b >> d; c >> e; [d, e] >> f``.
    """
    for left, right in pairwise(tasks):
        if not _is_list(left) or not _is_list(right):
            _join(left, right)
            continue
        if len(left) != len(right):
            raise refusal(
                f"chain() joins neighbouring lists pairwise; they have {len(left)} and {len(right)} items. "
                "Use chain_linear() to join each of the first with each of the second"
            )
        for up, down in zip(left, right, strict=True):
            _join(up, down)


def chain_linear(*elements: Any) -> None:
    """Draw ``a >> b >> ...`` over the elements; neighbouring lists are joined each with each, empty ones left out."""
    kept = [element for element in elements if not (_is_list(element) and not element)]
    if len(kept) < 2:
        raise refusal("chain_linear() needs at least two elements that are not empty")
    for left, right in pairwise(kept):
        _join(left, right)


def cross_downstream(from_tasks: Any, to_tasks: Any) -> None:
    """Draw an edge from each of ``from_tasks`` to each of ``to_tasks``."""
    _join(from_tasks, to_tasks)


def _join(left: Any, right: Any) -> None:
    for up in nodes(left):
        for down in nodes(right):
            connect(up, down)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)

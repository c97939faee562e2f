"""Copies of running runs in memory: a cache of rows, never the truth.

Reloading all states of a run for each end would make the cost of an end follow the size of the run; this keeps a
`RunView` per run instead. A copy is used only while the `version` of the run's row is the one this process wrote when
it last accounted the run; any other scheduler that accounts the run bumps it, and the copy is loaded anew. A copy is
also dropped when the transaction that changed it did not commit. The bound is the number of task instances held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dflow.core.graph import Graph
from dflow.core.planner import RunView
from dflow.core.states import TaskState

Key = tuple[str, int]  # task_id, map_index

_MAX_TASK_INSTANCES: Final = 250_000
_MAX_GRAPHS: Final = 500


@dataclass(slots=True)
class CachedRun:
    """One run as this process last saw it."""

    version: int
    graph: Graph
    view: RunView
    ids: dict[Key, int]
    keys: dict[int, Key]

    @classmethod
    def load(cls, version: int, graph: Graph, rows: Iterable[tuple[int, str, int, TaskState]]) -> CachedRun:
        """Build it from ``(ti_id, task_id, map_index, state)`` rows."""
        rows = list(rows)
        return cls(
            version=version,
            graph=graph,
            view=RunView(graph, [(task_id, map_index, state) for _, task_id, map_index, state in rows]),
            ids={(task_id, map_index): ti_id for ti_id, task_id, map_index, _ in rows},
            keys={ti_id: (task_id, map_index) for ti_id, task_id, map_index, _ in rows},
        )


class RunCache:
    """The most recently used runs."""

    def __init__(self, max_task_instances: int = _MAX_TASK_INSTANCES) -> None:
        self._max = max_task_instances
        self._held = 0
        self._runs: OrderedDict[int, CachedRun] = OrderedDict()

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, run_pk: int, version: int) -> CachedRun | None:
        """Return the copy if it is of this version; drop it if it is of another."""
        run = self._runs.get(run_pk)
        if run is None:
            return None
        if run.version != version:
            self.drop(run_pk)
            return None
        self._runs.move_to_end(run_pk)
        return run

    def put(self, run_pk: int, run: CachedRun) -> None:
        """Keep a copy, at the cost of the least recently used ones."""
        self.drop(run_pk)
        self._runs[run_pk] = run
        self._held += len(run.ids)
        while self._held > self._max and len(self._runs) > 1:
            self.drop(next(iter(self._runs)))

    def drop(self, run_pk: int) -> None:
        """Forget a run."""
        run = self._runs.pop(run_pk, None)
        if run is not None:
            self._held -= len(run.ids)


class GraphCache:
    """Graphs by DAG version. A version never changes, so nothing is ever stale; only the number is bounded."""

    def __init__(self, max_graphs: int = _MAX_GRAPHS) -> None:
        self._max = max_graphs
        self._graphs: OrderedDict[int, Graph] = OrderedDict()

    def get(self, dag_version_id: int) -> Graph | None:
        """Return the graph if it is known."""
        graph = self._graphs.get(dag_version_id)
        if graph is not None:
            self._graphs.move_to_end(dag_version_id)
        return graph

    def put(self, dag_version_id: int, graph: Graph) -> None:
        """Keep it."""
        self._graphs[dag_version_id] = graph
        while len(self._graphs) > self._max:
            self._graphs.popitem(last=False)

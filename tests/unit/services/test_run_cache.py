from __future__ import annotations

from dflow.core.graph import Graph
from dflow.core.spec import DagSpec, TaskSpec
from dflow.core.states import TaskState
from dflow.services.run_cache import CachedRun, GraphCache, RunCache

GRAPH = Graph(DagSpec(dag_id="d", tasks=(TaskSpec(task_id="a", operator="T"), TaskSpec(task_id="b", operator="T"))))


def load(version: int, first_id: int = 1) -> CachedRun:
    rows = [(first_id, "a", -1, TaskState.NONE), (first_id + 1, "b", -1, TaskState.NONE)]
    return CachedRun.load(version, GRAPH, rows)


def test_a_copy_of_another_version_is_dropped() -> None:
    cache = RunCache()
    cache.put(7, load(3))
    assert cache.get(7, 3) is not None
    assert cache.get(7, 4) is None
    assert cache.get(7, 3) is None, "it is gone for good"
    assert len(cache) == 0


def test_ids_and_keys_lead_to_each_other() -> None:
    run = load(1, first_id=10)
    assert run.ids[("b", -1)] == 11
    assert run.keys[11] == ("b", -1)


def test_the_least_recently_used_go_when_too_many_task_instances_are_held() -> None:
    cache = RunCache(max_task_instances=4)
    cache.put(1, load(0))
    cache.put(2, load(0))
    cache.get(1, 0)
    cache.put(3, load(0))
    assert cache.get(2, 0) is None
    assert cache.get(1, 0) is not None
    assert cache.get(3, 0) is not None
    cache.put(3, load(1))
    assert len(cache) == 2, "replacing one needs no room"


def test_one_run_larger_than_the_bound_is_kept_all_the_same() -> None:
    cache = RunCache(max_task_instances=1)
    cache.put(1, load(0))
    assert cache.get(1, 0) is not None


def test_graphs_are_bounded_too() -> None:
    graphs = GraphCache(max_graphs=1)
    graphs.put(1, GRAPH)
    graphs.put(2, GRAPH)
    assert graphs.get(1) is None
    assert graphs.get(2) is GRAPH

"""Arrows: between tasks, lists, groups, labels and results; setup and teardown blocks."""

from __future__ import annotations

import logging

import pytest

from dflow import (
    DAG,
    EmptyOperator,
    Label,
    TaskGroup,
    chain,
    chain_linear,
    cross_downstream,
    setup,
    task,
    task_group,
    teardown,
)
from dflow.authoring.dag import find_cycle
from dflow.core.graph import Graph


def edges(dag: DAG) -> set[str]:
    return {f"{up}>{task.task_id}" for task in dag.tasks for up in task.upstream_task_ids}


def empties(names: str) -> list[EmptyOperator]:
    return [EmptyOperator(task_id=name) for name in names]


def test_arrows_of_tasks_and_lists() -> None:
    with DAG("d") as dag:
        a, b, c, d, e = empties("abcde")
        a >> [b, c] >> d
        e << d
        [a, b] >> e
        c.set_downstream([e])
        b.set_upstream(e) if False else None
    assert edges(dag) == {"a>b", "a>c", "b>d", "c>d", "d>e", "a>e", "b>e", "c>e"}
    Graph(dag.to_spec())


def test_chains() -> None:
    with DAG("d") as dag:
        a, b, c, d, e, f = empties("abcdef")
        chain(a, [b, c], [d, e], f)
    assert edges(dag) == {"a>b", "a>c", "b>d", "c>e", "d>f", "e>f"}
    with DAG("e") as dag:
        a, b, c, d = empties("abcd")
        chain_linear(a, [], [b, c], d)
        cross_downstream([a, b], [d])
    assert edges(dag) == {"a>b", "a>c", "b>d", "c>d", "a>d"}


def test_labels() -> None:
    with DAG("d") as dag:
        a, b, c, d = empties("abcd")
        a >> Label("yes") >> [b, c] >> Label("done") >> d
        a >> d
    assert edges(dag) == {"a>b", "a>c", "b>d", "c>d", "a>d"}
    assert dag.to_spec().edge_labels == {"a>b": "yes", "a>c": "yes", "b>d": "done", "c>d": "done"}
    assert dag.get_edge_info("a", "b") == {"label": "yes"}
    assert dag.get_edge_info("a", "d") == {}


def test_groups_prefix_ids_and_take_arrows() -> None:
    with DAG("d", default_args={"retries": 1, "owner": "x"}) as dag:
        start, end = EmptyOperator(task_id="start"), EmptyOperator(task_id="end")
        with TaskGroup("outer", default_args={"retries": 2}, tooltip="tip") as outer:
            a = EmptyOperator(task_id="a")
            with TaskGroup("inner", default_args={"retries": 3}):
                b = EmptyOperator(task_id="b")
            with TaskGroup("plain", prefix_group_id=False):
                c = EmptyOperator(task_id="c")
            a >> [b, c]
        start >> outer >> end
    assert [a.task_id, b.task_id, c.task_id] == ["outer.a", "outer.inner.b", "outer.c"]
    assert [a.retries, b.retries, c.retries, b.owner] == [2, 3, 2, "x"]
    assert edges(dag) == {
        "start>outer.a",
        "outer.a>outer.inner.b",
        "outer.a>outer.c",
        "outer.inner.b>end",
        "outer.c>end",
    }
    groups = {group.group_id: group for group in dag.to_spec().groups}
    assert set(groups) == {"outer", "outer.inner", "outer.plain"}
    assert (groups["outer"].parent, groups["outer.inner"].parent, groups["outer"].tooltip) == (None, "outer", "tip")
    assert {t.task_id: t.task_group for t in dag.to_spec().tasks}["outer.c"] == "outer.plain"


def test_arrow_to_a_group_without_tasks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with DAG("d"), caplog.at_level(logging.WARNING):
        EmptyOperator(task_id="a") >> TaskGroup("g")
    assert "has no tasks yet" in caplog.text


def test_task_group_decorator() -> None:
    with DAG("d") as dag:

        @task
        def one(x: int) -> int:
            return x

        @task_group(tooltip="t")
        def both(x: int) -> object:
            return one(one(x))

        @task_group
        def nothing() -> None:
            EmptyOperator(task_id="e")

        first, second, group = both(1), both(2), nothing()
        first >> group
        both.override(group_id="named")(3)
    assert set(dag.task_ids) == {
        "both.one", "both.one__1", "both__1.one", "both__1.one__1", "nothing.e", "named.one", "named.one__1",
    }  # fmt: skip
    assert first.operator.task_id == "both.one__1"
    assert second.operator.task_id == "both__1.one__1"
    assert isinstance(group, TaskGroup)
    assert "both.one__1>nothing.e" in edges(dag)


def test_setup_and_teardown_blocks() -> None:
    with DAG("d") as dag:

        @setup
        def up() -> str:
            return "cluster"

        @teardown(on_failure_fail_dagrun=True)
        def down(cluster: str) -> None: ...

        made = up()
        with made >> down(made):
            a, b = empties("ab")
            a >> b
        after = EmptyOperator(task_id="after")
        b >> after
    tasks = {t.task_id: t for t in dag.to_spec().tasks}
    assert tasks["up"].is_setup
    assert (tasks["down"].is_teardown, tasks["down"].on_failure_fail_dagrun) == (True, True)
    assert tasks["down"].trigger_rule == "all_done_setup_success"
    assert edges(dag) == {"up>down", "up>a", "a>b", "b>down", "b>after"}


def test_as_teardown() -> None:
    with DAG("d") as dag:
        a, b, c = empties("abc")
        a >> b >> c.as_teardown(setups=a)
    assert (a.is_setup, c.is_teardown) == (True, True)
    assert edges(dag) == {"a>b", "b>c", "a>c"}


def test_teardown_is_no_leaf_of_its_group() -> None:
    with DAG("d") as dag:
        with TaskGroup("g") as group:
            a, b, c = empties("abc")
            a >> b >> c.as_teardown(setups=a)
        group >> EmptyOperator(task_id="end")
    assert "g.b>end" in edges(dag)
    assert "g.c>end" not in edges(dag)


def test_find_cycle_in_a_long_chain_does_not_recurse() -> None:
    graph = {str(i): [str(i + 1)] for i in range(20_000)} | {"20000": []}
    assert find_cycle(graph) == []
    graph["20000"] = ["19998"]
    assert find_cycle(graph) == ["19998", "19999", "20000", "19998"]

"""@task: arguments, results, ids, outputs, override."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

from dflow import DAG, BashOperator, PythonOperator, XComArg, task
from dflow.authoring.task_decorator import returns_mapping

if TYPE_CHECKING:
    from nowhere import Nothing  # type: ignore[import-not-found]


def test_calls_connect_and_repeat_with_suffix() -> None:
    with DAG("d") as dag:

        @task
        def load() -> int:
            return 1

        @task(retries=2)
        def use(x: object, *more: object, key: object = None) -> None: ...

        one, two, three = load(), load(), load.override(task_id="third")()
        use(one, [two, {"deep": (three,)}])
        again = use.override(retries=5, pool="p")(1, key=f"{one}")
    assert dag.task_ids == ["load", "load__1", "third", "use", "use__1"]
    assert dag.task_dict["use"].upstream_task_ids == {"load", "load__1", "third"}
    assert dag.task_dict["use"].retries == 2
    assert (again.operator.retries, again.operator.pool) == (5, "p")
    assert str(one) == "{{ task_instance.xcom_pull(task_ids='load', dag_id='d') }}"


def test_results_go_into_operators_and_arrows() -> None:
    with DAG("d") as dag:
        first = PythonOperator(task_id="first", python_callable=dict)
        second = BashOperator(task_id="second", bash_command=first.output, env={"A": first.output["key"]})  # type: ignore[dict-item]
        third = BashOperator(task_id="third", bash_command="x")
        first.output >> third
    assert second.upstream_task_ids == {"first"}
    assert third.upstream_task_ids == {"first"}
    assert first.output["key"] == XComArg(first, "key")
    assert dag.to_spec().tasks[1].upstream == ("first",)


def test_argument_set_after_the_operator_was_made_connects_too() -> None:
    with DAG("d") as dag:
        first = BashOperator(task_id="first", bash_command="x")
        second = BashOperator(task_id="second", bash_command="x")
        second.bash_command = first.output
    assert {t.task_id: t.upstream for t in dag.to_spec().tasks}["second"] == ("first",)


def a() -> dict[str, int]: ...  # type: ignore[empty-body]
def b() -> dict: ...  # type: ignore[empty-body,type-arg]
def c() -> Mapping[str, Any]: ...  # type: ignore[empty-body]
def d() -> int: ...  # type: ignore[empty-body]
def e() -> Nothing: ...
def f(x: Nothing) -> dict[str, Nothing]: ...
def g(): ...


@pytest.mark.parametrize(
    ("function", "expected"), [(a, True), (b, True), (c, True), (d, False), (e, False), (f, True), (g, False)]
)
def test_multiple_outputs_is_inferred_from_the_annotation(function: Any, expected: bool) -> None:
    assert returns_mapping(function) is expected
    with DAG("d"):
        assert task(function).kwargs["multiple_outputs"] is expected
        assert task(multiple_outputs=not expected)(function).kwargs["multiple_outputs"] is not expected


def test_context_arguments_need_not_be_given() -> None:
    with DAG("d"):

        @task
        def use(ti, x, ds=None, **context): ...

        use(x=1)


def test_docstring_becomes_doc() -> None:
    with DAG("d"):

        @task
        def use():
            """What it does."""

        assert use().operator.doc_md == "What it does."


def test_same_function_in_two_dags_and_groups() -> None:
    @task
    def use(): ...

    with DAG("d") as one:
        use()
    with DAG("e") as two:
        use()
    assert (one.task_ids, two.task_ids) == (["use"], ["use"])


def test_task_without_dag_is_allowed_until_it_is_added() -> None:
    @task
    def use(): ...

    result = use()
    assert not result.operator.has_dag()
    DAG("d").add_task(result.operator)
    assert result.operator.dag_id == "d"


def test_five_thousand_calls_are_quick_to_tell_apart() -> None:
    with DAG("d") as dag:

        @task
        def use(x=None): ...

        last = None
        for _ in range(5_000):
            last = use(last)
    assert len(dag.task_dict) == 5_000
    assert "use__4999" in dag.task_dict
    assert len(dag.to_spec().tasks) == 5_000

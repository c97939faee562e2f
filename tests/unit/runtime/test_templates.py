"""Rendering: what is a template, what it sees, what an error says."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import jinja2
import pytest

from dflow import DAG, BaseOperator, literal, task
from dflow.runtime.context import build_context
from dflow.runtime.task_instance import TaskInstance
from dflow.runtime.templates import TemplateRenderError, render
from tests.unit.runtime.support_attempts import Client, attempt, work


class Echo(BaseOperator):
    template_fields = ("value",)
    template_ext = (".sql",)

    def __init__(self, *, value: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.value = value

    def execute(self, context: Any) -> Any:
        return self.value


def rendered(
    value: Any, client: Client | None = None, params: dict[str, Any] | None = None, **dag_arguments: Any
) -> Any:
    """Return ``value`` as an attempt renders it."""
    with DAG("d", **dag_arguments) as dag:
        operator = Echo(task_id="t", value=None)
    ti = TaskInstance(work(dag, "t", conf={"n": 5}), operator, client or Client(), xcom_max_bytes=1000)
    context = build_context(ti, params or {})
    return render(value, context, operator, field="value", template_ext=operator.template_ext)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ("{{ ds }} {{ ds_nodash }}", "2026-03-29 20260329"),
        ("{{ ts }}", "2026-03-29T01:30:15.000042+00:00"),
        ("{{ ts_nodash }} {{ ts_nodash_with_tz }}", "20260329T013015 20260329T013015.000042+0000"),
        ("{{ logical_date | ds }} {{ data_interval_end | ts_nodash }}", "2026-03-29 20260329T013015"),
        ("{{ run_id }} {{ dag.dag_id }} {{ task.task_id }} {{ ti.try_number }}", "run d t 1"),
        ("{{ dag_run.conf['n'] }} {{ dag_run.run_type }} {{ conf.n }}", "5 manual 5"),
        ("{{ params.n }}", "3"),
        ("{{ macros.ds_add(ds, -29) }} {{ macros.ds_format(ds, '%Y-%m-%d', '%d.%m.%y') }}", "2026-02-28 29.03.26"),
        ("{{ (logical_date + macros.timedelta(days=1)) | ds }} {{ macros.json.dumps([1]) }}", "2026-03-30 [1]"),
        ("{% for i in range(2) %}{{ i }},{% endfor %}{# gone #}", "0,1,"),
        ("{{ task_instance_key_str }}", "d__t__20260329"),
        ("{{ ti.xcom_pull(task_ids='up') }}", "7"),
        ("{% do [].append(1) %}x", "x"),
    ],
)  # fmt: skip
def test_strings(template: str, expected: str) -> None:
    assert rendered(template, Client(up=7), {"n": 3}) == expected


def test_containers_are_gone_through_and_rebuilt() -> None:
    Point = namedtuple("Point", "x y")
    value = {"{{ ds }}": ["{{ ds }}", ("{{ run_id }}", 1)], "s": {"{{ run_id }}"}, "p": Point("{{ run_id }}", None)}
    result = rendered(value)
    assert result == {"{{ ds }}": ["2026-03-29", ("run", 1)], "s": {"run"}, "p": Point("run", None)}
    plain: dict[str, list[int]] = {"a": [1]}
    assert rendered(plain) == plain
    assert rendered(plain) is not plain
    assert rendered(plain)["a"] is not plain["a"]


def test_objects_with_template_fields_are_rendered_on_a_copy() -> None:
    class Inner:
        template_fields = ("a",)

        def __init__(self) -> None:
            self.a, self.b = "{{ run_id }}", "{{ run_id }}"

    inner = Inner()
    result = rendered([inner])[0]
    assert (result.a, result.b, inner.a) == ("run", "{{ run_id }}", "{{ run_id }}")


def test_literal_is_left_alone() -> None:
    assert rendered([literal("{{ ds }}")]) == ["{{ ds }}"]


def test_files_are_found_beside_the_dag_and_in_the_search_path(tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "q.sql").write_text("select '{{ ds }}' {% include 'part.sql' %}")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "part.sql").write_text("-- {{ run_id }}")
    with DAG("d", template_searchpath="more") as dag:
        Echo(task_id="t", value=["sql/q.sql", "no template"])
        Echo(task_id="missing", value="sql/none.sql")
    dag.fileloc = str(tmp_path / "dag.py")
    assert attempt(dag, "t").xcoms["return_value"] == ["select '2026-03-29' -- run", "no template"]
    missing = attempt(dag, "missing")
    assert "template file 'sql/none.sql' of 'value' was not found in" in (missing.cause or "")


def test_native_objects() -> None:
    assert rendered("{{ [1, 2] }}", render_template_as_native_obj=True) == [1, 2]
    assert rendered("{{ params.n }}", params={"n": {"a": 1}}, render_template_as_native_obj=True) == {"a": 1}
    assert rendered("7", render_template_as_native_obj=True) == 7
    assert rendered("{{ [1, 2] }}") == "[1, 2]"


def test_macros_filters_and_options_of_the_dag() -> None:
    options = {
        "user_defined_macros": {"twice": lambda x: x * 2, "city": "Oslo"},
        "user_defined_filters": {"shout": lambda x: x.upper()},
    }
    assert rendered("{{ twice(2) }} {{ city | shout }}", **options) == "4 OSLO"
    marks = {"variable_start_string": "[[", "variable_end_string": "]]"}
    assert rendered("[[ ds ]] {{ x }}", jinja_environment_kwargs=marks) == "2026-03-29 {{ x }}"
    assert rendered("a{{ nothing }}b", template_undefined=jinja2.Undefined) == "ab"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ run_di }}", 'did you mean "run_id"?'),
        ("{{ execution_date }}", "it was removed in Airflow 3; use logical_date"),
        ("{{ next_ds }}", "use {{ data_interval_end | ds }}"),
        ("{{ prev_start_date_success }}", "not supported yet"),
        ("{% if %}", "Expected an expression"),
        ("{{ params.nothing }}", "has no attribute 'nothing'"),
        ("{{ ds.__class__ }}", "unsafe"),
        ("{{ ds | nothing }}", "No filter named 'nothing'"),
    ],
)
def test_errors_name_the_field_and_the_remedy(template: str, message: str) -> None:
    with pytest.raises(TemplateRenderError, match="'value' cannot be rendered") as caught:
        rendered(template)
    assert message in str(caught.value)


def test_variables_and_connections_say_what_is_the_matter() -> None:
    with pytest.raises(Exception, match="not supported yet: Variables"):
        rendered("{{ var.value.x }}")


def test_run_without_logical_date_has_no_ds() -> None:
    with DAG("d") as dag:
        Echo(task_id="t", value="{{ ds }}")
    outcome = attempt(dag, "t", logical_date=None)
    assert "this run has no logical date; use dag_run.run_after" in (outcome.cause or "")


def test_environment_and_jinja_are_not_touched_without_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    import dflow.runtime.templates as module

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("made an environment")

    monkeypatch.setattr(module, "_make_environment", never)
    with DAG("d") as dag:

        @task
        def use(x):
            return x

        use([1, "plain", {"a": "b"}])
    assert attempt(dag, "use").xcoms == {"return_value": [1, "plain", {"a": "b"}]}
    assert "jinja2" in sys.modules  # by this test's own import; the product does not need it here

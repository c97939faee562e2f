"""Every mistake an author can make is refused with file, line and what to do; one table of them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from dflow.core.errors import DagCycleError, DagDefinitionError, DagImportError, DuplicateTaskIdError
from dflow.runtime.loader import load_dags

HEADER = """\
from datetime import UTC, date, datetime, timedelta, timezone
from dflow import *
from dflow import DAG
def f(): pass
"""

# (name, code after the header; the line to be blamed ends in "# here", and what the message must hold)
MISTAKES = [
    ("unknown dag argument", 'DAG("d", schedul="@daily")  # here',
     'takes no argument \'schedul\', did you mean "schedule"?'),
    ("renamed dag argument", 'DAG("d", schedule_interval=None)  # here', "Airflow 3 renamed it to schedule"),
    ("bad dag id", 'DAG("a b")  # here', "dag_id 'a b' is not valid: use only letters"),
    ("empty dag id", 'DAG("")  # here', "is not valid"),
    ("long dag id", 'DAG("a" * 251)  # here', "251 characters; at most 250"),
    ("naive start", 'DAG("d", start_date=datetime(2026, 1, 2))  # here', "datetime(2026, 1, 2, tzinfo=UTC)"),
    ("date start", 'DAG("d", start_date=date(2026, 1, 2))  # here', "must be a datetime with a time zone, not date"),
    ("naive in default_args", 'DAG("d", default_args={"start_date": datetime(2026, 1, 2)})  # here', "no time zone"),
    ("half-hour offset", 'DAG("d", start_date=datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=5.5))))  # here',
     "use a zone with a name"),
    ("ends before it starts",
     'DAG("d", start_date=datetime(2026, 1, 2, tzinfo=UTC), end_date=datetime(2026, 1, 1, tzinfo=UTC))  # here',
     "ends (2026-01-01"),
    ("bad cron", 'DAG("d", schedule="61 * * * *")  # here', "minute field"),
    ("bad preset", 'DAG("d", schedule="@dayly")  # here', 'did you mean "@daily"?'),
    ("None as text", 'DAG("d", schedule="None")  # here', "write schedule=None"),
    ("negative interval", 'DAG("d", schedule=timedelta(0))  # here', "must be more than zero"),
    ("assets", 'DAG("d", schedule=["s3://x"])  # here', "not supported yet: a schedule of assets"),
    ("odd schedule", 'DAG("d", schedule=5)  # here', "not supported yet: a schedule of type int"),
    ("timetable zone", 'CronTriggerTimetable("@daily", timezone="Europe/Berln")  # here', "unknown time zone"),
    ("catchup without start", 'DAG("d", schedule="@daily", catchup=True)  # here', "catchup=True but no start_date"),
    ("continuous twice", 'DAG("d", schedule="@continuous", max_active_runs=2)  # here', "max_active_runs=1 only"),
    ("zero runs", 'DAG("d", max_active_runs=0)  # here', "max_active_runs of 'd' must be between 1 and"),
    ("tags as text", 'DAG("d", tags="etl")  # here', "write tags=['etl']"),
    ("long tag", 'DAG("d", tags=["x" * 101])  # here', "1 to 100 characters"),
    ("owner link", 'DAG("d", owner_links={"me": "example.org"})  # here', "must be a http(s) or mailto link"),
    ("dag callback", 'DAG("d", on_failure_callback=f)  # here', "not supported yet: on_failure_callback= of DAG 'd'"),
    ("params not json", 'DAG("d", params={"x": object()})  # here', "params of DAG 'd': 'x' is not JSON"),
    ("default_args no dict", 'DAG("d", default_args=[1])  # here', "default_args must be a dict"),
    ("unknown operator argument", 'EmptyOperator(task_id="t", retires=1)  # here', 'did you mean "retries"?'),
    ("old operator argument", 'PythonOperator(task_id="t", python_callable=f, provide_context=True)  # here',
     "the context is always provided"),
    ("positional", 'EmptyOperator("t")  # here', "takes keyword arguments only"),
    ("missing argument", 'BashOperator(task_id="t")  # here', "BashOperator 't' needs the argument 'bash_command'"),
    ("missing task id", 'EmptyOperator()  # here', "needs the argument 'task_id'"),
    ("bad task id", 'EmptyOperator(task_id="a/b")  # here', "task_id 'a/b' is not valid"),
    ("task id no text", 'EmptyOperator(task_id=3)  # here', "task_id must be a string, not int"),
    ("negative retries", 'EmptyOperator(task_id="t", retries=-1)  # here', "retries of 't' must be between 0"),
    ("retries no int", 'EmptyOperator(task_id="t", retries="3")  # here', "must be an int, not str"),
    ("negative delay", 'EmptyOperator(task_id="t", retry_delay=timedelta(seconds=-1))  # here', "must not be negative"),
    ("delay no time", 'EmptyOperator(task_id="t", retry_delay="5m")  # here', "must be a timedelta, not str"),
    ("timeout no time", 'EmptyOperator(task_id="t", execution_timeout=30)  # here', "must be a timedelta, not int"),
    ("zero timeout", 'EmptyOperator(task_id="t", execution_timeout=timedelta(0))  # here', "must be more than zero"),
    ("bad trigger rule", 'EmptyOperator(task_id="t", trigger_rule="all_sucess")  # here',
     'did you mean "all_success"?'),
    ("old trigger rule", 'EmptyOperator(task_id="t", trigger_rule="none_failed_or_skipped")  # here',
     "use 'none_failed_min_one_success'"),
    ("bad weight rule", 'EmptyOperator(task_id="t", weight_rule="down")  # here', "weight_rule 'down' does not exist"),
    ("pool slots", 'EmptyOperator(task_id="t", pool_slots=0)  # here', "pool_slots of 't' must be between 1"),
    ("backoff", 'EmptyOperator(task_id="t", retry_exponential_backoff=0.5)  # here', "a number of 1 or more"),
    ("task callback", 'EmptyOperator(task_id="t", on_retry_callback=f)  # here',
     "not supported yet: on_retry_callback="),
    ("past", 'EmptyOperator(task_id="t", depends_on_past=True)  # here', "not supported yet: depends_on_past="),
    ("outlets", 'EmptyOperator(task_id="t", outlets=["x"])  # here', "(assets)"),
    ("called callable", 'PythonOperator(task_id="t", python_callable=f())  # here',
     "write its name without calling it"),
    ("bash no text", 'BashOperator(task_id="t", bash_command=3)  # here', "bash_command of 't' must be a string"),
    ("mapping", 'EmptyOperator.partial(task_id="t")  # here', "dynamic task mapping"),
    ("no dag for relation", 'EmptyOperator(task_id="a") >> EmptyOperator(task_id="b")  # here', "have no DAG yet"),
    ("two dags", """
        with DAG("d"): a = EmptyOperator(task_id="a")
        with DAG("e"): b = EmptyOperator(task_id="b")
        a >> b  # here
        """, "different DAGs: d.a and e.b"),
    ("result of another dag", """
        @task
        def g(x=None): pass
        with DAG("d"): a = g()
        with DAG("e"):
            g(a)  # here
        """, "different DAGs"),
    ("itself", """
        with DAG("d"): a = EmptyOperator(task_id="a")
        a >> a  # here
        """, "cannot depend on itself"),
    ("uncalled task", """
        @task
        def g(): pass
        with DAG("d"):
            EmptyOperator(task_id="a") >> g  # here
        """, "call it first"),
    ("relation to text", """
        with DAG("d"):
            EmptyOperator(task_id="a") >> "b"  # here
        """, "not str 'b'"),
    ("group without dag", 'TaskGroup("g")  # here', "needs a DAG"),
    ("dot in group id", """
        with DAG("d"):
            TaskGroup("a.b")  # here
        """, "group_id 'a.b' is not valid"),
    ("unknown group argument", """
        with DAG("d"):
            TaskGroup("a", tooltp="")  # here
        """, 'did you mean "tooltip"?'),
    ("chain of unequal lists", """
        with DAG("d"): a, b, c = (EmptyOperator(task_id=i) for i in "abc")
        chain([a], [b, c])  # here
        """, "they have 1 and 2 items"),
    ("unknown decorator argument", """
        with DAG("d"):
            @task(retriez=2)  # here
            def g(): pass
            g()
        """, '@task takes no argument \'retriez\', did you mean "retries"?'),
    ("unknown argument of override", """
        @task
        def g(): pass
        h = g.override(taskid="h")  # here
        with DAG("d"): h()
        """, 'override() takes no argument \'taskid\', did you mean "task_id"?'),
    ("old decorator argument", """
        task(f, provide_context=True)  # here
        """, "the context is always provided"),
    ("task argument missing", """
        @task
        def g(x, y): pass
        with DAG("d"):
            g(1)  # here
        """, "g(): missing a required argument: 'y'"),
    ("task argument unknown", """
        @task
        def g(x): pass
        with DAG("d"):
            g(1, z=2)  # here
        """, "unexpected keyword argument 'z'"),
    ("context default", """
        task(lambda ds="2026-01-01": None)  # here
        """, "its default can only be None"),
    ("iterate a result", """
        @task
        def g(): return 1
        with DAG("d"):
            a, b = g()  # here
        """, "is not known while the file is parsed"),
    ("index a result", """
        @task
        def g(): return 1
        with DAG("d"):
            g()[0]  # here
        """, "takes only string keys"),
    ("expand", """
        @task
        def g(x): return 1
        with DAG("d"):
            g.expand(x=[1])  # here
        """, "not supported yet: expand()"),
    ("later decorator", "task.branch  # here", "not supported yet: @task.branch"),
    ("later name", "from dflow import Variable  # here", "not supported yet: dflow.Variable"),
    ("label of no text", "Label(3)  # here", "a label must be a string"),
    ("get_current_context", "get_current_context()", "works only while a task runs"),
    ("op without super().__init__", """
        class Op(BaseOperator):
            def __init__(self, *, task_id): pass
        Op(task_id="t")  # here
        """, "does not call super().__init__"),
    ("template field without attribute", """
        class Op(BaseOperator):
            template_fields = ("sql",)
            def __init__(self, *, sq, **kwargs):
                super().__init__(**kwargs)
                self.sq = sq
        Op(task_id="t", sq="")  # here
        """, 'sets no such attribute, did you mean "sq"?'),
    ("two dags of one id", """
        a = DAG("d")
        b = DAG("d")  # here
        """, "two DAGs of this file have the id 'd'"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "expected"), [pytest.param(m[1], m[2], id=m[0]) for m in MISTAKES])
def test_mistakes_name_file_line_and_remedy(tmp_path: Path, code: str, expected: str) -> None:
    file = tmp_path / "my_dag.py"
    source = HEADER + textwrap.dedent(code)
    file.write_text(source)
    with pytest.raises(DagImportError) as caught:
        load_dags(file, bundle_root=tmp_path)
    message = str(caught.value)
    assert expected in message
    blamed = next((number for number, line in enumerate(source.splitlines(), 1) if line.endswith("# here")), None)
    if blamed is not None:
        assert f"{file}:{blamed}" in message
    assert "dflow/authoring" not in caught.value.traceback


# What only the finished DAG shows.
WHOLE = [
    ("cycle", 'a, b = EmptyOperator(task_id="a"), EmptyOperator(task_id="b"); a >> b >> a', DagCycleError,
     "a >> b >> a"),
    ("param without default", 'dag.params["x"] = Param(type="integer")', DagDefinitionError, "needs valid defaults"),
    ("param with bad default", 'dag.params["x"] = Param("y", type="integer")', DagDefinitionError, "is not of type"),
    ("task param with bad default", 'EmptyOperator(task_id="a", params={"x": Param("y", type="integer")})',
     DagDefinitionError, "task 'a': param 'x'"),
    ("bad schema", 'dag.params["x"] = Param(1, type="nmber")', DagDefinitionError, "not a valid JSON Schema"),
    ("late task start",
     'EmptyOperator(task_id="a", start_date=datetime(2027, 1, 1, tzinfo=UTC))', DagDefinitionError, "later than that"),
    ("early task end", 'EmptyOperator(task_id="a", end_date=datetime(2027, 1, 1, tzinfo=UTC))', DagDefinitionError,
     "before that of its DAG"),
    ("teardown rule", 'EmptyOperator(task_id="a", trigger_rule="all_done_setup_success")', DagDefinitionError,
     "only teardowns have"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "kind", "expected"), [pytest.param(*m[1:], id=m[0]) for m in WHOLE])
def test_mistakes_of_the_whole(tmp_path: Path, code: str, kind: type[Exception], expected: str) -> None:
    file = tmp_path / "my_dag.py"
    start = "start_date=datetime(2026, 1, 1, tzinfo=UTC)"
    file.write_text(f'{HEADER}with DAG("d", schedule="@daily", {start}) as dag:\n    {code}\n')
    dag = load_dags(file, bundle_root=tmp_path).dags["d"]
    with pytest.raises(kind, match=re.escape(expected)) as caught:
        dag.to_spec()
    assert str(caught.value).startswith(f"{file}:")


def test_duplicate_task_id_names_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "my_dag.py"
    file.write_text(f'{HEADER}with DAG("d"):\n    EmptyOperator(task_id="a")\n    EmptyOperator(task_id="a")\n')
    with pytest.raises(DagImportError, match="already used") as caught:
        load_dags(file, bundle_root=tmp_path)
    assert isinstance(caught.value.__cause__, DuplicateTaskIdError)
    assert str(caught.value).startswith(f"{file}:7: ")
    assert f"({file}:6)" in str(caught.value)


def test_group_and_task_share_one_name_space() -> None:
    from dflow import DAG, EmptyOperator, TaskGroup

    with DAG("d"):
        TaskGroup("a")
        with pytest.raises(DuplicateTaskIdError):
            EmptyOperator(task_id="a")
        EmptyOperator(task_id="b")
        with pytest.raises(DuplicateTaskIdError):
            TaskGroup("b")

"""DAGs, their schedule, their defaults, and the spec they reduce to."""

from __future__ import annotations

import logging
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from dflow import (
    DAG,
    BaseOperator,
    BashOperator,
    CronTriggerTimetable,
    DeltaTriggerTimetable,
    EmptyOperator,
    Param,
    dag,
    task,
)
from dflow.authoring.defaults import Defaults
from dflow.core import serialization
from dflow.core.spec import ScheduleSpec

START = datetime(2026, 1, 1, tzinfo=UTC)


def test_importing_dflow_does_no_work() -> None:
    code = "import sys, dflow; print([m for m in sys.modules if m.startswith('dflow.') or m == 'jinja2'])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_every_exported_name_exists() -> None:
    import dflow

    for name in dflow.__all__:
        assert getattr(dflow, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        dflow.nonsense  # noqa: B018
    assert "DAG" in dir(dflow)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, ScheduleSpec()),
        ("@daily", ScheduleSpec(kind="cron", expression="0 0 * * *", summary="@daily")),
        ("*/5 * * * *", ScheduleSpec(kind="cron", expression="*/5 * * * *", summary="*/5 * * * *")),
        ("@once", ScheduleSpec(kind="once", summary="@once")),
        ("@continuous", ScheduleSpec(kind="continuous", summary="@continuous")),
        (timedelta(hours=4), ScheduleSpec(kind="delta", interval_seconds=14400.0, summary="4:00:00")),
        (DeltaTriggerTimetable(timedelta(days=1)),
         ScheduleSpec(kind="delta", interval_seconds=86400.0, summary="1 day, 0:00:00")),
        (
            CronTriggerTimetable("0 3 * * *", timezone="Europe/Paris"),
            ScheduleSpec(kind="cron", expression="0 3 * * *", summary="0 3 * * *", timezone="Europe/Paris"),
        ),
    ],
)  # fmt: skip
def test_schedules(schedule: object, expected: ScheduleSpec) -> None:
    assert DAG("d", schedule=schedule, start_date=START).to_spec().schedule == expected


@pytest.mark.parametrize(
    ("zone", "name"),
    [
        (UTC, "UTC"),
        (ZoneInfo("America/New_York"), "America/New_York"),
        (timezone(timedelta(hours=2)), "Etc/GMT-2"),
        (timezone(timedelta(hours=-3)), "Etc/GMT+3"),
        (timezone(timedelta(0)), "UTC"),
    ],
)
def test_cron_is_read_in_the_zone_of_the_start_date(zone: object, name: str) -> None:
    start = datetime(2026, 7, 1, tzinfo=zone)  # type: ignore[arg-type]
    spec = DAG("d", schedule="@daily", start_date=start).to_spec()
    assert spec.schedule.timezone == name
    assert spec.start_date == start
    assert spec.start_date is not None
    assert spec.start_date.tzinfo is UTC


def test_without_a_start_date_the_default_zone_holds() -> None:
    assert DAG("d", schedule="@daily").to_spec(Defaults(timezone="Asia/Tokyo")).schedule.timezone == "Asia/Tokyo"


def test_defaults_stand_in_for_what_is_not_given() -> None:
    defaults = Defaults(
        retries=7, retry_delay_seconds=1.5, execution_timeout_seconds=9.0, owner="me", queue="q", max_active_runs=3,
        max_active_tasks=4, catchup=True,
    )  # fmt: skip
    with DAG("d") as plain:
        EmptyOperator(task_id="a")
        EmptyOperator(task_id="b", retries=0, retry_delay=timedelta(0), owner="you", queue="other")
    spec = plain.to_spec(defaults)
    assert (spec.max_active_runs, spec.max_active_tasks, spec.catchup) == (3, 4, True)
    a, b = spec.tasks
    assert (a.retries, a.retry_delay_seconds, a.execution_timeout_seconds, a.owner, a.queue) == (7, 1.5, 9.0, "me", "q")
    assert (b.retries, b.retry_delay_seconds, b.owner, b.queue) == (0, 0.0, "you", "other")


def test_spec_of_everything_survives_serialization() -> None:
    with DAG(
        "d", description="x", schedule="@hourly", start_date=START, end_date=START + timedelta(days=9), catchup=True,
        max_active_runs=2, max_active_tasks=5, dagrun_timeout=timedelta(hours=1), doc_md="# hi", tags=["b", "a", "b"],
        owner_links={"me": "mailto:me@example.org"}, params={"n": Param(1, "how many", type="integer"), "s": (1, 2)},
        is_paused_upon_creation=False, dag_display_name="D", render_template_as_native_obj=True,
    ) as made:  # fmt: skip
        EmptyOperator(
            task_id="a", retries=2, retry_delay=30, retry_exponential_backoff=True,
            max_retry_delay=timedelta(minutes=5), execution_timeout=timedelta(seconds=90), pool="p", pool_slots=2,
            priority_weight=10, weight_rule="absolute",
            trigger_rule="all_done", doc_md="doc", task_display_name="A", params={"t": 1}, executor="CeleryExecutor",
            do_xcom_push=False,
        )  # fmt: skip
    spec = made.to_spec()
    assert serialization.from_json(serialization.to_json(spec)) == spec
    assert spec.tags == ("a", "b")
    assert spec.params["n"] == {"value": 1, "description": "how many", "schema": {"type": "integer"}}
    (a,) = spec.tasks
    assert (a.retry_delay_seconds, a.retry_exponential_backoff, a.max_retry_delay_seconds) == (30.0, 2.0, 300.0)
    assert (a.effective_priority, a.is_empty, a.execution_timeout_seconds) == (10, True, 90.0)


def test_empty_operators_with_something_to_do_are_not_empty() -> None:
    class Mine(EmptyOperator):
        pass

    with DAG("d") as made:
        EmptyOperator(task_id="a")
        EmptyOperator(task_id="b", post_execute=lambda context, result: None)
        Mine(task_id="c")
    assert {t.task_id: t.is_empty for t in made.to_spec().tasks} == {"a": True, "b": False, "c": False}


def test_default_args_of_dag_operator_and_subclass_arguments() -> None:
    class Greet(BaseOperator):
        def __init__(self, *, name: str, polite: bool = False, **kwargs: object) -> None:
            super().__init__(**kwargs)  # type: ignore[arg-type]
            self.name, self.polite = name, polite

    with DAG("d", default_args={"retries": 3, "name": "Ada", "polite": True, "owner": "x"}):
        one = Greet(task_id="one")
        two = Greet(task_id="two", name="Bob", default_args={"retries": 5})
    assert (one.name, one.polite, one.retries, one.owner) == ("Ada", True, 3, "x")
    assert (two.name, two.retries) == ("Bob", 5)


def test_default_args_that_nobody_takes_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with DAG("d", default_args={"retires": 3, "email": ["x"]}) as made:
        EmptyOperator(task_id="a")
    with caplog.at_level(logging.WARNING):
        made.to_spec()
    told = [record.getMessage() for record in caplog.records if "default_args" in record.getMessage()]
    words = "has 'retires', which no operator of it takes, did you mean \"retries\"?"
    assert told == [f"{made.location}: default_args of DAG 'd' {words}"]


def test_start_date_of_default_args_is_that_of_the_dag() -> None:
    with DAG("d", schedule="@daily", default_args={"start_date": START}) as made:
        EmptyOperator(task_id="a")
    assert made.to_spec().start_date == START


def test_continuous_dag_has_one_run_at_a_time() -> None:
    assert DAG("d", schedule="@continuous", start_date=START).to_spec().max_active_runs == 1


def test_dag_decorator_makes_params_and_docs() -> None:
    @dag(schedule=None, params={"given": 5})
    def pipeline(name: str, n: int = 3, given: int = 7) -> None:
        """What it does."""

        @task
        def use(a: str, b: int) -> None: ...

        use(name, n)
        BashOperator(task_id="sh", bash_command=f"echo {n}")

    made = pipeline(n=4)
    assert made.dag_id == "pipeline"
    assert made.doc_md == "What it does."
    assert dict(made.params) == {"given": 7, "name": None, "n": 4}
    assert not made.params.get_param("name").has_value
    assert made.task_dict["sh"].bash_command == "echo {{ params['n'] }}"  # type: ignore[attr-defined]


def test_dag_decorator_without_arguments_and_with_id() -> None:
    @dag
    def plain() -> None:
        EmptyOperator(task_id="a")

    @dag("other")
    def named() -> None:
        EmptyOperator(task_id="a")

    assert (plain().dag_id, named().dag_id) == ("plain", "other")


def test_operator_without_dag_is_added_later_or_by_a_relation() -> None:
    late, later = EmptyOperator(task_id="late"), EmptyOperator(task_id="later")
    made = DAG("d")
    made.add_task(late)
    late >> later
    assert made.task_ids == ["late", "later"]
    assert later.dag is made
    assert late.downstream_task_ids == {"later"}


def test_doc_md_file_is_read(tmp_path: object) -> None:
    assert DAG("d", doc_md="missing.md").doc_md == "missing.md"

"""A whole run in one process, through the real planner and runner."""

from __future__ import annotations

import logging
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dflow import DAG, AirflowSkipException, BashOperator, EmptyOperator, Param, ParamValidationError, task
from dflow.core.errors import DagDefinitionError
from dflow.core.states import Reason, RunState, TaskState
from dflow.runtime.inline import InlineRun, run_dag
from tests.unit.runtime.support_attempts import settings


def run(dag: DAG, **arguments: Any) -> InlineRun:
    return run_dag(dag, settings=settings(), **arguments)


def test_results_flow_and_states_are_returned(capsys: pytest.CaptureFixture[str]) -> None:
    with DAG("d", params={"n": Param(2, type="integer")}) as dag:

        @task
        def numbers(params) -> dict[str, list]:
            return {"values": list(range(params["n"]))}

        @task
        def total(values):
            return sum(values)

        shown = BashOperator(task_id="shown", bash_command="echo {{ ti.xcom_pull(task_ids='total') }} {{ ds }}")
        total(numbers()["values"]) >> shown >> EmptyOperator(task_id="end")
    done = run(dag, conf={"n": 4}, logical_date=datetime(2026, 5, 1, tzinfo=UTC), run_id="mine")
    assert (done.state, done.cause, done.run_id) == (RunState.SUCCESS, None, "mine")
    assert set(done.states.values()) == {TaskState.SUCCESS}
    assert (done.xcom("total"), done.xcom("shown"), done.xcom("end")) == (6, "6 2026-05-01", None)
    assert "6 2026-05-01" in capsys.readouterr().err


def test_failures_skips_and_trigger_rules() -> None:
    with DAG("d") as dag:

        @task
        def fails():
            raise ValueError("no")

        @task
        def skips():
            raise AirflowSkipException

        @task(trigger_rule="all_done")
        def cleans(): ...

        bad, skipped = fails(), skips()
        bad >> EmptyOperator(task_id="after_bad")
        skipped >> EmptyOperator(task_id="after_skipped")
        [bad, skipped] >> cleans()
    done = run(dag)
    assert done.state is RunState.FAILED
    assert {name: state.value for name, state in done.states.items()} == {
        "fails": "failed", "skips": "skipped", "after_bad": "upstream_failed", "after_skipped": "skipped",
        "cleans": "success",
    }  # fmt: skip
    assert done.outcomes["fails"].cause == "ValueError: no"


def test_retries_happen_without_waiting(caplog: pytest.LogCaptureFixture) -> None:
    tries = []
    with DAG("d") as dag:

        @task(retries=2, retry_delay=600)
        def flaky(ti):
            tries.append((ti.try_number, ti.xcom_pull(key="from_before")))
            ti.xcom_push("from_before", 1)
            if len(tries) < 3:
                raise ValueError
            return "ok"

        flaky()
    with caplog.at_level(logging.INFO):
        done = run(dag)
    assert done.state is RunState.SUCCESS
    assert tries == [(1, None), (2, None), (3, None)]
    assert "a real run waits 600 s here" in caplog.text


def test_higher_priority_goes_first() -> None:
    order: list[str] = []
    with DAG("d") as dag:
        for name, weight in (("a", 1), ("b", 5), ("c", 3)):

            @task(task_id=name, priority_weight=weight)
            def note(ti):
                order.append(ti.task_id)

            note()
    run(dag)
    assert order == ["b", "c", "a"]


def test_what_cannot_work_is_refused() -> None:
    with DAG("d", params={"n": Param(type="integer")}) as dag:
        EmptyOperator(task_id="a")
    with pytest.raises(ParamValidationError, match="no default and no value"):
        run(dag)
    with pytest.raises(DagDefinitionError, match="no time zone"):
        run(dag, conf={"n": 1}, logical_date=datetime(2026, 1, 1))
    with pytest.raises(DagDefinitionError, match="is not JSON"):
        run(dag, conf={"n": object()})
    assert run(dag, conf={"n": 1}).state is RunState.SUCCESS


def test_empty_dag_succeeds() -> None:
    assert run(DAG("d")).state in (RunState.SUCCESS, RunState.FAILED)


def test_interrupt_ends_the_run() -> None:
    with DAG("d") as dag:

        @task(retries=5)
        def stop():
            raise KeyboardInterrupt

        stop()
    with pytest.raises(KeyboardInterrupt):
        run(dag)


def test_dag_test_in_a_script(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(
        """
from dflow import DAG, task
with DAG("d") as dag:
    @task
    def hello(params): print("hello", params["who"])
    hello()
if __name__ == "__main__":
    run = dag.test(run_conf={"who": "Ada"})
    print(run.state)
"""
    )
    env = {"DFLOW_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines() == ["hello Ada", "success"]
    assert "hello: success" in done.stderr
    assert not (tmp_path / "home").exists()


def test_dag_test_refuses_what_it_does_not_do() -> None:
    with pytest.raises(DagDefinitionError, match="use_executor= of DAG"):
        DAG("d").test(use_executor=True)


def test_reasons_of_outcomes_are_kept() -> None:
    with DAG("d") as dag:
        BashOperator(task_id="a", bash_command="exit 99")
    assert run(dag).outcomes["a"].reason is Reason.SKIP_RAISED

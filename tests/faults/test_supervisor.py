"""A supervisor killed in the middle of a run costs its tasks nothing but time."""

from __future__ import annotations

import json
import signal

import pytest
from sqlalchemy import text

from dflow.embedded import urls
from dflow.store.engine import Store
from tests.standalone_rig import homes
from tests.support import check_invariants, eventually

pytestmark = pytest.mark.faults

SOURCE = """
import time
from dflow import DAG, chain, task

@task
def work() -> None:
    time.sleep(0.5)

with DAG("slow", is_paused_upon_creation=False):
    chain(*(work.override(task_id=f"step_{number}")() for number in range(8)))
"""


@pytest.mark.parametrize("executor", ["CeleryExecutor", "LocalExecutor"])
def test_kill_9_of_the_supervisor_in_the_middle_of_a_run(executor):
    with homes() as make:
        standalone = make(env={"DFLOW__WORKER__LEASE_SECONDS": "4", "DFLOW__WORKER__KILL_GRACE": "1"})
        (standalone.home / "dags").mkdir(parents=True)
        (standalone.home / "dags" / "slow.py").write_text(SOURCE)
        options = ("--no-flower", "--executor", executor)
        standalone.start(*options)
        eventually(lambda: standalone.command("dags", "trigger", "slow", "--run-id", "r").returncode == 0, 60)
        eventually(lambda: standalone.execute("SELECT count(*) FROM task_instance WHERE state = 'success'") >= 2, 60)
        before = standalone.processes()
        standalone.process.kill()
        standalone.process.wait()

        standalone.start(*options)
        assert all(one.find() is None for one in before.values())
        done = "SELECT state FROM dag_run WHERE ended_at IS NOT NULL"
        eventually(lambda: standalone.execute(f"SELECT count(*) FROM ({done}) r") == 1, 120)
        assert standalone.execute(done) == "success"
        assert standalone.execute("SELECT sum(user_failures) FROM task_instance") == 0
        tasks = json.loads(standalone.command("tasks", "states", "slow", "r", "--output", "json").stdout)
        assert [task["state"] for task in tasks] == ["success"] * 8
        with Store(urls(standalone.home)[0]) as store, store.begin() as tx:
            assert tx.execute(text("SELECT count(*) FROM unaccounted")).scalar_one() == 0
            check_invariants(tx)


LONG = """
import time
from dflow import DAG, task

@task
def work() -> None:
    time.sleep(900)

with DAG("long", is_paused_upon_creation=False):
    work()
"""


@pytest.mark.parametrize("executor", ["CeleryExecutor", "LocalExecutor"])
def test_a_second_ctrl_c_does_not_wait_for_running_tasks_and_they_run_again(executor):
    with homes() as make:
        standalone = make(env={"DFLOW__WORKER__DRAIN_GRACE": "900", "DFLOW__WORKER__KILL_GRACE": "1"})
        (standalone.home / "dags").mkdir(parents=True)
        (standalone.home / "dags" / "long.py").write_text(LONG)
        options = ("--no-flower", "--executor", executor)
        standalone.start(*options)
        eventually(lambda: standalone.command("dags", "trigger", "long", "--run-id", "r").returncode == 0, 60)
        running = "SELECT count(*) FROM task_instance WHERE state = 'running'"
        eventually(lambda: standalone.execute(running) == 1, 60)
        standalone.process.send_signal(signal.SIGINT)
        eventually(lambda: "Stopping" in standalone.output(), 30)
        assert standalone.interrupt() == 0

        standalone.start(*options)
        eventually(lambda: standalone.execute("SELECT count(*) FROM ti_event WHERE to_state = 'running'") == 2, 120)
        assert standalone.execute("SELECT sum(user_failures) FROM task_instance") == 0
        assert standalone.command("runs", "cancel", "long", "r").returncode == 0
        eventually(lambda: standalone.execute("SELECT count(*) FROM dag_run WHERE state = 'failed'") == 1, 60)

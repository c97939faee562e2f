"""The commands a user types first, against a running scheduler, dag-processor and Celery worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support import Cluster

pytestmark = pytest.mark.integration

SOURCE = """
from dflow import DAG, Param, task

with DAG("cli_etl", schedule=None, params={"bad": Param(False, type="boolean")}):
    @task
    def extract():
        print("extracting")
        return [1, 2, 3]

    @task
    def load(rows, **context):
        print("loading", rows)
        if context["params"]["bad"]:
            raise ValueError("bad zone")

    load(extract())
"""


@pytest.fixture
def dflow(cluster: Cluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    cluster.start(workers=1)
    cluster.add_dag("cli_etl.py", SOURCE)
    cluster.wait_dag("cli_etl")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dflow", *arguments],
            env={**os.environ, **cluster.settings.as_env()},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=90,
        )

    return run


def test_trigger_wait_and_read_the_logs(
    cluster: Cluster, dflow: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    good = dflow("dags", "trigger", "cli_etl", "--run-id", "good", "--wait", "--timeout", "60")
    assert good.returncode == 0, good
    assert good.stdout.startswith("cli_etl good success in ")
    assert "Warning" not in good.stderr
    assert "2 success" in good.stderr
    assert "loading [1, 2, 3]\n" in dflow("tasks", "logs", "cli_etl", "good", "load", "--raw").stdout

    bad = dflow("dags", "trigger", "cli_etl", "--conf", '{"bad": true}', "--run-id", "bad", "--wait", "--timeout", "60")
    assert bad.returncode == 1, bad
    assert "load failed: ValueError: bad zone" in bad.stdout
    assert "dflow tasks logs cli_etl bad load" in bad.stdout
    assert "ValueError: bad zone" in dflow("tasks", "logs", "cli_etl", "bad", "load", "--follow").stdout

    info = json.loads(dflow("info", "-o", "json").stdout)
    assert {service["kind"] for service in info["services"]} == {"scheduler", "dag-processor"}
    assert [worker["executor"] for worker in info["workers"]] == ["CeleryExecutor"]
    cluster.invariants()

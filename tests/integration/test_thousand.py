"""A thousand task instances on two workers: all succeed, each exactly once."""

from __future__ import annotations

import pytest

from tests import ledger

pytestmark = pytest.mark.integration
RUNS = 20


def test_a_thousand_task_instances_each_run_exactly_once(cluster):
    env = ledger.install(cluster, seconds=0.0)
    cluster.dag_processor()
    cluster.scheduler()
    for name in ("one", "two"):
        cluster.run("worker", "--name", name, "--concurrency", "4", label=f"worker-{name}", env=env)
    cluster.wait_dag(ledger.DAG_ID)
    runs = [cluster.trigger(ledger.DAG_ID) for _ in range(RUNS)]
    for run in runs:
        cluster.wait_run(run, 180, state="success")
    ledger.ran_exactly_once(cluster, RUNS)
    assert cluster.count("SELECT count(*) FROM attempt WHERE state = 'success'") == RUNS * ledger.TASKS
    assert cluster.count("SELECT count(DISTINCT worker_id) FROM attempt") == 2
    cluster.invariants()

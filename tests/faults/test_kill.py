"""Each part killed without warning while it is busy: everything still ends, nothing runs beside itself, nobody pays."""

from __future__ import annotations

import signal

import psutil
import pytest
import redis

from tests import ledger
from tests.support import Cluster, Component, eventually

pytestmark = pytest.mark.faults
RUNS = 6


@pytest.fixture
def busy(cluster: Cluster):
    """A cluster of two schedulers and two workers in the middle of several runs."""
    return make_busy(cluster)


def make_busy(cluster: Cluster, count: int = RUNS, seconds: float = 0.05):
    env = ledger.install(cluster, seconds=seconds)
    cluster.dag_processor()
    schedulers = [cluster.scheduler() for _ in range(2)]

    def worker() -> Component:
        name = f"w{len(cluster.components)}"
        return cluster.run("worker", "--name", name, "--concurrency", "4", label=f"worker-{name}", env=env)

    workers = [worker() for _ in range(2)]
    cluster.wait_dag(ledger.DAG_ID)
    eventually(lambda: cluster.count("SELECT count(*) FROM worker WHERE state = 'live'") == 2, 60)
    runs = [cluster.trigger(ledger.DAG_ID) for _ in range(count)]
    eventually(lambda: ledger.entries(cluster) > 20, 60)
    return schedulers, workers, worker, runs


def everything_ends_well(cluster: Cluster, runs: list[int]) -> None:
    for run in runs:
        cluster.wait_run(run, 120, state="success")
    ledger.never_beside_itself(cluster, len(runs))
    ledger.no_user_retry_spent(cluster)
    cluster.invariants()


def running_child(cluster: Cluster, worker: Component) -> psutil.Process:
    """A process of this worker that runs a task right now."""
    pids = {child.pid for child in worker.children()}

    def find() -> psutil.Process | None:
        rows = cluster.rows("SELECT pid FROM task_instance WHERE state = 'running'")
        return next((psutil.Process(row.pid) for row in rows if row.pid in pids), None)

    child = eventually(find, 60)
    assert child
    return child


def test_kill_9_of_a_scheduler(cluster, busy):
    schedulers, _, _, runs = busy
    cluster.kill(schedulers[0])
    everything_ends_well(cluster, runs)


def test_kill_9_of_every_scheduler_and_a_new_one(cluster, busy):
    schedulers, _, _, runs = busy
    for scheduler in schedulers:
        cluster.kill(scheduler)
    cluster.scheduler()
    everything_ends_well(cluster, runs)


def test_kill_9_of_a_workers_parent(cluster, busy):
    _, workers, start_worker, runs = busy
    running_child(cluster, workers[0])
    children = workers[0].children()
    cluster.kill(workers[0])
    eventually(lambda: not any(child.is_running() for child in children), 30, message="its processes are gone")
    start_worker()
    everything_ends_well(cluster, runs)
    causes = cluster.rows("SELECT cause FROM worker WHERE state = 'gone'")
    assert "the worker's process died" in [row.cause for row in causes]


def test_kill_9_of_a_task_process(cluster, busy):
    _, workers, _, runs = busy
    running_child(cluster, workers[0]).send_signal(signal.SIGKILL)
    everything_ends_well(cluster, runs)
    (lost,) = cluster.rows("SELECT * FROM attempt WHERE state <> 'success'")
    assert (lost.state, lost.reason, lost.exit_code) == ("up_for_retry", "signalled", -9)
    assert "signal 9" in lost.cause


def test_kill_9_of_an_agent(cluster, busy):
    _, workers, start_worker, runs = busy
    (agent,) = [child for child in workers[0].children() if "dflow.runtime.agent" in " ".join(child.cmdline())]
    agent.kill()
    eventually(lambda: not workers[0].is_running(), 60, message="the worker without an agent has exited")
    assert workers[0].process.returncode != 0
    start_worker()
    everything_ends_well(cluster, runs)


def test_flushall_of_redis(make_cluster, make_settings, own_redis_server):
    cluster = make_cluster(settings=make_settings(broker_url=own_redis_server.url))
    _, _, _, runs = make_busy(cluster)
    client = redis.Redis(unix_socket_path=own_redis_server.url.removeprefix("redis+socket://").split("?")[0])
    client.flushall()
    client.close()
    everything_ends_well(cluster, runs)


def test_each_fault_once_during_a_thousand_task_instances(make_cluster, make_settings, own_redis_server):
    cluster = make_cluster(settings=make_settings(broker_url=own_redis_server.url))
    schedulers, workers, start_worker, runs = make_busy(cluster, count=20, seconds=0.02)
    ended = "SELECT count(*) FROM attempt WHERE state = 'success'"

    def reached(count: int) -> None:
        eventually(lambda: cluster.count(ended) >= count, 120, message=f"{count} attempts have succeeded")

    reached(150)
    cluster.kill(schedulers[0])
    reached(300)
    running_child(cluster, workers[0]).send_signal(signal.SIGKILL)
    reached(450)
    cluster.kill(workers[1])
    start_worker()
    reached(600)
    client = redis.Redis(unix_socket_path=own_redis_server.url.removeprefix("redis+socket://").split("?")[0])
    client.flushall()
    client.close()
    everything_ends_well(cluster, runs)
    assert cluster.count("SELECT count(*) FROM task_instance WHERE state = 'success'") == 1000

"""The worker while the database or the broker is away."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dflow.embedded import PostgresServer, RedisServer
from tests.integration.worker.cut import Cut, through
from tests.integration.worker.rig import WorkerRig
from tests.support import eventually, marked_processes

pytestmark = pytest.mark.integration


@pytest.fixture
def cut(postgres_server: PostgresServer) -> Iterator[Cut]:
    directory = Path(tempfile.mkdtemp(prefix="dflow-cut-", dir="/tmp"))
    cut = Cut(directory, postgres_server.socket_dir)
    yield cut
    cut.close()
    shutil.rmtree(directory)


def test_a_short_outage_of_the_database_only_makes_tasks_wait(
    rig: WorkerRig,
    cut: Cut,
    postgres_server: PostgresServer,
) -> None:
    run = rig.dag("@task\ndef t():\n    print('up', flush=True)\n    time.sleep(1)\n    return 5\nt()\n")
    first, second = rig.queue_many(run, ["t"], copies=2)
    rig.worker(
        concurrency=1, env={**through(rig, cut, postgres_server.socket_dir), "DFLOW__WORKER__LEASE_SECONDS": "30"}
    )
    rig.publish(first, second)
    eventually(lambda: rig.lines(first), 20)
    cut.cut()
    eventually(lambda: "the database is away" in rig.log(), 20)
    cut.join()
    for nudge in (first, second):
        row = rig.wait(nudge)
        assert (row.try_number, row.infra_failures) == (1, 0)
    assert rig.rows("SELECT count(*) FROM xcom WHERE key = 'return_value'")[0][0] == 2


@pytest.mark.parametrize("how", ["cut", "hang"])
def test_tasks_are_ended_before_a_lease_that_cannot_be_renewed(
    rig: WorkerRig,
    cut: Cut,
    postgres_server: PostgresServer,
    how: str,
) -> None:
    run = rig.dag("@task\ndef t():\n    print('up', flush=True)\n    time.sleep(600)\nt()\n")
    nudge = rig.queue(run)
    worker = rig.worker(
        env={
            **through(rig, cut, postgres_server.socket_dir),
            "DFLOW__WORKER__LEASE_SECONDS": "6",
            "DFLOW__WORKER__KILL_GRACE": "0.5",
        }
    )
    rig.publish(nudge)
    eventually(lambda: rig.lines(nudge), 20)
    pid = rig.ti(nudge).pid
    getattr(cut, how)()
    eventually(lambda: _is_dead(pid), 15, interval_seconds=0.01)
    assert rig.rows("SELECT lease_until > clock_timestamp() FROM worker")[0][0], "the lease was over while the task ran"
    assert rig.wait_exit(worker, 15) == 75
    eventually(lambda: not marked_processes(rig.token), 10)
    assert rig.ti(nudge).state == "running"


def test_an_idle_worker_consumes_again_after_redis_was_killed(
    make_rig: Callable[..., WorkerRig],
    own_redis_server: RedisServer,
) -> None:
    rig = make_rig(broker_url=own_redis_server.url)
    run = rig.dag("@task\ndef t(): pass\nt()\n")
    before, after = rig.queue_many(run, ["t"], copies=2)
    worker = rig.worker("-l", "INFO")
    rig.publish(before)
    rig.wait(before)
    identity = own_redis_server.identity
    assert identity is not None
    psutil.Process(identity.pid).send_signal(signal.SIGKILL)
    eventually(lambda: "Connection to broker lost" in rig.log(), 20)
    own_redis_server.start()
    rig.publisher.close()
    rig.publish(after)
    rig.wait(after, deadline_seconds=15)
    assert worker.poll() is None


def test_a_worker_that_starts_before_its_database_waits_for_it(
    rig: WorkerRig,
    cut: Cut,
    postgres_server: PostgresServer,
) -> None:
    cut.cut()
    nudge = rig.queue(rig.dag("@task\ndef t(): pass\nt()\n"))
    rig.publish(nudge)
    worker = rig.start("worker", "-c", "1", env=through(rig, cut, postgres_server.socket_dir))
    rig.workers.append(worker)
    eventually(lambda: "waiting for the database" in rig.log(), 20)
    cut.join()
    rig.wait(nudge)


def test_a_worker_that_still_waits_for_its_database_can_be_stopped(
    rig: WorkerRig,
    cut: Cut,
    postgres_server: PostgresServer,
) -> None:
    cut.cut()
    worker = rig.start("worker", "-c", "1", env=through(rig, cut, postgres_server.socket_dir))
    rig.workers.append(worker)
    eventually(lambda: "waiting for the database" in rig.log(), 20)
    worker.send_signal(signal.SIGTERM)
    rig.wait_exit(worker, 15)


def test_health_connections_and_celerys_own_commands(rig: WorkerRig) -> None:
    run = rig.dag("@task\ndef t():\n    print('up', flush=True)\n    time.sleep(600)\nt()\n")
    nudges = rig.queue_many(run, ["t"], copies=3)
    rig.worker("-Q", "default,other", concurrency=32, env={"DFLOW__WORKER__LEASE_SECONDS": "8"})
    rig.publish(*nudges)
    for nudge in nudges:
        rig.wait(nudge, "running")
    (row,) = rig.rows("SELECT * FROM worker")
    assert (row.queues, row.concurrency, row.executor) == (["default", "other"], 32, "CeleryExecutor")
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'dflow %'"
    )
    assert rig.rows(query)[0][0] <= 3
    eventually(lambda: _get(f"{row.health_url}/readyz")[0] == 200, 20)
    assert _get(f"{row.health_url}/healthz")[1]["running"] == 3
    active = rig.celery("inspect", "active", "--json", "--timeout", "10", "-d", row.name)
    (tasks,) = json.loads(active.stdout).values()
    assert {(task["name"], task["id"]) for task in tasks} == {
        (f"d.t[{nudge.map_index}]", nudge.attempt_id) for nudge in nudges
    }
    assert rig.celery("control", "--timeout", "10", "-d", row.name, "pool_grow", "2").returncode == 0
    eventually(lambda: rig.rows("SELECT concurrency FROM worker")[0][0] == 34, 15)
    rig.celery("control", "shutdown")
    rig.wait_exit(rig.workers[0], 30)
    assert {rig.ti(nudge).reason for nudge in nudges} == {"worker_drained"}


def _is_dead(pid: int) -> bool:
    """Whether it runs no more; its parent need not have collected it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _get(url: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)

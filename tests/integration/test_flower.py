"""Celery's own tools on a running cluster: `inspect active` and Flower show tasks by name, under the attempt's id."""

from __future__ import annotations

import base64
import json
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support import Cluster, Component, eventually

pytestmark = pytest.mark.integration

LOGIN = "ann:a-password"

# Every task waits until the test writes the file.
SOURCE = """
import time
from pathlib import Path
from dflow import DAG, task

with DAG("watched", schedule=None) as dag:
    @task
    def hold(event):
        while not Path(event).exists():
            time.sleep(0.05)

    @task
    def held(event):
        while not Path(event).exists():
            time.sleep(0.05)

    hold({event!r})
    held({event!r})
"""


class Flower:
    """A started Flower and its API."""

    def __init__(self, component: Component, port: int) -> None:
        self.component, self.port = component, port

    def get(self, path: str, *, login: str = LOGIN) -> Any:
        """Return what the API answers; fails, to be asked again, while it does not."""
        token = base64.b64encode(login.encode()).decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Basic {token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            error.close()
            raise AssertionError(f"{path}: HTTP {error.code}") from None
        except OSError as error:
            assert self.component.is_running(), self.component.log()
            raise AssertionError(f"{path}: {error}") from None

    def tasks(self, state: str) -> dict[str, Any]:
        return {name: one for name, one in self.get("/api/tasks").items() if one["state"] == state}


@pytest.fixture
def event(tmp_path: Path) -> Path:
    return tmp_path / "event"


@pytest.fixture
def started(cluster: Cluster, event: Path) -> Cluster:
    cluster.start(workers=2, concurrency=1)
    cluster.add_dag("watched.py", SOURCE.format(event=str(event)))
    cluster.wait_dag("watched")
    return cluster


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wrapped(cluster: Cluster) -> Flower:
    """`dflow flower`, set as `dflow standalone` sets it."""
    port = free_port()
    env = {"DFLOW__CELERY__FLOWER_PORT": str(port), "DFLOW__CELERY__FLOWER_BASIC_AUTH": LOGIN}
    return Flower(cluster.run("flower", env=env), port)


def stock(cluster: Cluster) -> Flower:
    """`celery -A worker flower`, as the manual of Flower says."""
    port = free_port()
    env = {"FLOWER_BASIC_AUTH": LOGIN}
    return Flower(cluster.celery("flower", "--address=127.0.0.1", f"--port={port}", env=env), port)


def attempts(cluster: Cluster, run_pk: int) -> dict[str, str]:
    """Return the attempt id of each running task, by Celery's name for it."""
    rows = cluster.rows(
        "SELECT dag_id, task_id, attempt_id FROM task_instance WHERE run_pk = :r AND state = 'running'", r=run_pk
    )
    return {f"{row.dag_id}.{row.task_id}": str(row.attempt_id) for row in rows}


def hold(cluster: Cluster) -> tuple[int, dict[str, str]]:
    """Trigger the DAG; returns the run and its attempts once both tasks run."""
    run_pk = cluster.trigger("watched", run_id="a run of 'mine'")
    eventually(lambda: len(attempts(cluster, run_pk)) == 2, 60)
    return run_pk, attempts(cluster, run_pk)


def test_inspect_active_shows_what_runs_by_name(started: Cluster, event: Path) -> None:
    run_pk, expected = hold(started)
    shown = started.celery_output("inspect", "active", "--json", "--timeout", "10")
    active = [one for tasks in json.loads(shown).values() for one in tasks]
    assert {one["id"] for one in active} == set(expected.values())
    assert {one["name"]: one["id"] for one in active} == expected
    event.touch()
    started.wait_run(run_pk, state="success")
    started.invariants()


@pytest.mark.parametrize("start", [wrapped, stock])
def test_flower_shows_what_runs_by_name_and_how_it_ended(started: Cluster, event: Path, start: Any) -> None:
    flower = start(started)
    names = {str(row.name) for row in started.rows("SELECT name FROM worker WHERE state = 'live'")}
    eventually(lambda: set(flower.get("/api/workers?refresh=1")) == names, 60)
    eventually(lambda: flower.get("/api/workers?status=1") == dict.fromkeys(names, True), 60)
    # Until Flower has turned the events on (it asks every five seconds) it would not hear of tasks.
    workers = [one for one in started.components if one.name.startswith("w")]
    eventually(lambda: all("enabled by remote" in one.log() for one in workers), 60)
    run_pk, expected = hold(started)

    running = eventually(lambda: len(found := flower.tasks("STARTED")) == 2 and found, 30)
    assert {one["name"]: attempt_id for attempt_id, one in running.items()} == expected
    ti_ids = {str(row.attempt_id): row.id for row in started.rows("SELECT id, attempt_id FROM task_instance")}
    for attempt_id, one in running.items():
        assert one["args"] == f"(run_id=\"a run of 'mine'\", ti_id={ti_ids[attempt_id]})"
        assert one["kwargs"] == "{}"
        assert one["worker"] in names
    for name in names:
        shown = flower.get(f"/api/workers?refresh=1&workername={name}")[name]
        assert [one["id"] for one in shown["active"]] == [i for i, one in running.items() if one["worker"] == name]
        assert {one["name"] for one in shown["active"]} <= set(expected)

    event.touch()
    started.wait_run(run_pk, state="success")
    ended = eventually(lambda: len(found := flower.tasks("SUCCESS")) == 2 and found, 30)
    assert {one["name"]: attempt_id for attempt_id, one in ended.items()} == expected
    info = flower.get(f"/api/task/info/{expected['watched.hold']}")
    assert (info["name"], info["state"]) == ("watched.hold", "SUCCESS")
    started.kill(flower.component, signal.SIGTERM)
    assert flower.component.process.wait(timeout=30) == 0
    started.invariants()


def test_without_the_password_flower_says_nothing(cluster: Cluster) -> None:
    cluster.worker(concurrency=1)
    flower = wrapped(cluster)
    eventually(lambda: isinstance(flower.get("/api/tasks"), dict), 60)
    for login in ("ann:wrong", ":", ""):
        with pytest.raises(AssertionError, match="HTTP 401"):
            flower.get("/api/tasks", login=login)
    assert LOGIN not in "".join(arg for one in flower.component.children() for arg in one.cmdline())
    assert LOGIN.split(":")[1] not in flower.component.log()

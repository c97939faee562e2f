"""The contract of every executor: what publishing a nudge comes to, with real processes and no scheduler.

One suite over all of them. The Celery executor's worker is started by the test, as a user would; the local ones start
their host themselves.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dflow.core.errors import PublishError
from dflow.core.messages import Nudge
from dflow.executors.base import Executor
from dflow.executors.local import LocalExecutor
from dflow.executors.registry import NAMES, executor_for
from dflow.settings import Settings
from dflow.store.engine import Store
from tests.integration.worker.rig import WorkerRig
from tests.support import MARKER, eventually, marked_processes

pytestmark = pytest.mark.integration
LOCAL = ("LocalExecutor", "SequentialExecutor")


class Bench:
    """One executor with its workers, over rows made queued directly."""

    def __init__(self, settings: Settings, store: Store, directory: Path) -> None:
        self.settings = settings
        self.rig = WorkerRig(settings, store, directory)
        self.executor: Executor = executor_for(settings)
        self.is_stopped = False

    def start(self) -> Bench:
        self.executor.start()
        if self.executor.name == "CeleryExecutor":
            self.rig.worker(concurrency=2)
        else:
            eventually(self.live_workers, 30, message="the host has registered")
        return self

    def live_workers(self) -> int:
        return len(self.rig.rows("SELECT id FROM worker WHERE state = 'live' AND executor = :e", e=self.executor.name))

    def stop(self) -> None:
        if not self.is_stopped:
            self.is_stopped = True
            self.executor.stop()
            self.rig.stop()


@pytest.fixture
def make_bench(
    make_settings: Callable[..., Settings], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Bench]]:
    benches: list[Bench] = []

    def make(name: str) -> Bench:
        bench = Bench(make_settings({"core.executor": name, "core.parallelism": "2"}), store, tmp_path)
        monkeypatch.setenv(MARKER, bench.rig.token)  # hosts are started from this very process
        benches.append(bench)
        return bench

    yield make
    for bench in benches:
        bench.stop()
        assert not [one for one in marked_processes(bench.rig.token) if one.pid != os.getpid()]
    for folder in tmp_path.rglob("bundle-cache"):
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=NAMES)
def bench(request: pytest.FixtureRequest, make_bench: Callable[[str], Bench]) -> Bench:
    return make_bench(request.param).start()


@pytest.fixture(params=LOCAL)
def local(request: pytest.FixtureRequest, make_bench: Callable[[str], Bench]) -> Bench:
    return make_bench(request.param).start()


def test_what_is_published_runs(bench: Bench) -> None:
    run = bench.rig.dag("for name in 'abc':\n    task(task_id=name)(lambda: 7)()")
    nudges = bench.rig.queue_many(run, ["a", "b", "c"])
    bench.executor.publish(nudges)
    for nudge in nudges:
        assert bench.rig.wait(nudge).try_number == 1
    assert len(bench.rig.rows("SELECT 1 FROM xcom WHERE run_pk = :r", r=run)) == 3


def test_a_duplicate_and_a_stale_attempt_are_dropped(bench: Bench) -> None:
    run = bench.rig.dag("@task\ndef t():\n    pass\nt()\n@task\ndef last():\n    pass\nlast()")
    nudge = bench.rig.queue(run)
    last = bench.rig.queue(run, "last")
    stale = replace(nudge, attempt_id="00000000-0000-4000-8000-000000000000")
    bench.executor.publish([stale, nudge, nudge])
    bench.rig.wait(nudge)
    bench.executor.publish([nudge, last])
    bench.rig.wait(last)
    assert bench.rig.ti(nudge).try_number == 1
    assert len(bench.rig.rows("SELECT 1 FROM attempt WHERE ti_id = :i", i=nudge.ti_id)) == 1


def test_one_process_runs_in_order(make_bench: Callable[[str], Bench]) -> None:
    bench = make_bench("SequentialExecutor").start()
    run = bench.rig.dag("for n in range(5):\n    task(task_id=f't{n}')(lambda: None)()")
    nudges = bench.rig.queue_many(run, [f"t{n}" for n in (3, 1, 4, 0, 2)])
    bench.executor.publish(nudges)
    for nudge in nudges:
        bench.rig.wait(nudge)
    ends = bench.rig.rows("SELECT ti_id FROM attempt ORDER BY started_at, ended_at")
    assert [row.ti_id for row in ends] == [nudge.ti_id for nudge in nudges]
    assert len({row.pid for row in bench.rig.rows("SELECT pid FROM attempt")}) == 1, "the process stays warm"


def test_a_killed_process_ends_its_attempt_with_a_cause_and_is_replaced(bench: Bench) -> None:
    run = bench.rig.dag(
        "@task\ndef dies():\n    os.kill(os.getpid(), signal.SIGKILL)\ndies()\n@task\ndef t():\n    pass\nt()"
    )
    dies, fine = bench.rig.queue(run, "dies"), bench.rig.queue(run)
    bench.executor.publish([dies])
    row = bench.rig.wait(dies, "failed", "up_for_retry")
    assert row.reason == "signalled"
    assert row.cause
    bench.executor.publish([fine])
    bench.rig.wait(fine)


def test_stopping_lets_what_runs_finish_and_claims_nothing_more(local: Bench) -> None:
    gate = local.rig.directory / "gate"
    run = local.rig.dag(
        f"@task\ndef waits():\n    open({str(gate)!r} + '.started', 'w').close()\n"
        f"    while not os.path.exists({str(gate)!r}):\n        time.sleep(0.01)\nwaits()\n"
        "for n in range(4):\n    task(task_id=f't{n}')(lambda: time.sleep(0.2))()"
    )
    waits = local.rig.queue(run, "waits")
    local.executor.publish([waits])
    eventually((gate.parent / "gate.started").exists, 30)
    assert isinstance(local.executor, LocalExecutor)
    assert local.executor.host_pid is not None
    host = psutil.Process(local.executor.host_pid)
    host.send_signal(signal.SIGTERM)
    eventually(lambda: local.rig.rows("SELECT 1 FROM worker WHERE state = 'draining'"), 30)
    later = local.rig.queue(run, "t0")
    local.executor.publish([later])
    gate.touch()
    local.rig.wait(waits)
    eventually(lambda: not psutil.pid_exists(host.pid) or host.status() == psutil.STATUS_ZOMBIE, 30)
    assert local.rig.ti(later).state == "queued", "a draining host claims nothing"


def test_a_killed_host_is_restarted_and_its_lost_rows_run_when_published_again(local: Bench) -> None:
    run = local.rig.dag("for n in range(3):\n    task(task_id=f't{n}')(lambda: None)()")
    assert isinstance(local.executor, LocalExecutor)
    first = local.executor.host_pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)  # what is published now never leaves the socket
    nudges = local.rig.queue_many(run, ["t0", "t1", "t2"])
    local.executor.publish(nudges)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: local.executor.host_pid not in (None, first), 30)

    def publish_again() -> bool:
        try:
            local.executor.publish(nudges)
        except PublishError:
            return False
        return True

    eventually(publish_again, 30)
    for nudge in nudges:
        local.rig.wait(nudge)


def test_publishing_without_a_broker_is_an_error_in_bounded_time(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings({"celery.broker_socket_timeout": "0.5"}, broker_url="redis+socket:///nowhere/redis.sock")
    executor = executor_for(settings)
    executor.start()
    nudge = Nudge(
        ti_id=1, attempt_id="a", dag_id="d", task_id="t", run_id="r", map_index=-1, queue="default", priority_weight=1
    )
    with pytest.raises(PublishError, match="published again"):
        executor.publish([nudge])
    executor.publish([])
    executor.stop()

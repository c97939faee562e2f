"""Admission: every limit, and that nothing which cannot run keeps others from running."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import text

from dflow.store.admission import admit

from .rows import Rows

pytestmark = pytest.mark.integration


def admitted(tx, *, limit=512, lookahead=None, executor="CeleryExecutor"):
    return [n.ti_id for n in admit(tx, executor=executor, limit=limit, lookahead=lookahead or {}, actor="test")]


@pytest.fixture
def rows(store):
    with store.begin() as tx:
        rows = Rows(tx)
        rows.dag()
        yield rows


def test_nothing_is_admitted_without_a_live_worker(rows):
    rows.tasks(rows.run(), 3)
    rows.worker("default", state="draining")
    rows.worker("default", lease=-1)
    rows.worker("other")
    assert admitted(rows.tx) == []


def test_a_nudge_carries_the_new_attempt_and_the_names(rows):
    run = rows.run()
    (ti_id,) = rows.tasks(run, queue="gpu", priority=7)
    rows.worker("gpu")
    (nudge,) = admit(rows.tx, executor="CeleryExecutor", limit=9, lookahead={}, actor="test")
    row = rows.tx.execute(text("SELECT * FROM task_instance WHERE id = :i"), {"i": ti_id}).one()
    assert (nudge.ti_id, nudge.attempt_id, nudge.task_id) == (ti_id, str(row.attempt_id), row.task_id)
    assert (nudge.queue, nudge.priority_weight, row.state) == ("gpu", 7, "queued")


def test_admission_fills_the_slots_of_live_workers_and_the_lookahead(rows):
    rows.tasks(rows.run(max_active_tasks=100), 50)
    rows.worker("default", concurrency=4)
    rows.worker("default", "gpu", concurrency=3)
    assert len(admitted(rows.tx)) == 7
    assert admitted(rows.tx) == []
    assert len(admitted(rows.tx, lookahead={"default": 5})) == 5


def test_a_run_stays_within_max_active_tasks(rows):
    rows.worker("default", concurrency=100)
    small, large = rows.run(max_active_tasks=3), rows.run(max_active_tasks=20)
    rows.tasks(small, 1, state="running")
    rows.tasks(small, 10)
    rows.tasks(large, 10)
    admitted(rows.tx)
    assert rows.states(small) == {"running": 1, "queued": 2, "scheduled": 8}
    assert rows.states(large) == {"queued": 10}


def test_a_pool_is_never_overbooked_and_counts_pool_slots(rows):
    rows.worker("default", concurrency=100)
    rows.pool("etl", 10)
    rows.pool("closed", 0)
    rows.pool("endless", -1)
    run = rows.run(max_active_tasks=1000)
    rows.tasks(run, 1, state="running", pool="etl", pool_slots=3)
    rows.tasks(run, 5, pool="etl", pool_slots=3)
    rows.tasks(run, 4, pool="closed")
    rows.tasks(run, 20, pool="endless", queue="default")
    rows.tasks(run, 2, pool="no_such_pool")
    admitted(rows.tx)
    used = rows.tx.execute(
        text("SELECT pool, sum(pool_slots) FROM task_instance WHERE state IN ('queued', 'running') GROUP BY pool")
    ).all()
    assert dict(tuple(row) for row in used) == {"etl": 9, "endless": 20}


def test_a_full_pool_with_the_highest_priority_does_not_fill_the_window(rows):
    """The scenario of a greedy DAG whose thousands of top-priority tasks wait for a full pool."""
    rows.worker("default", concurrency=10)
    rows.pool("full", 1)
    greedy = rows.run(max_active_tasks=1000)
    rows.tasks(greedy, 1, state="running", pool="full")
    rows.tasks(greedy, 500, pool="full", priority=1000)
    rows.dag("meek")
    meek = rows.run("meek")
    rows.tasks(meek, 5, priority=1)
    assert len(admitted(rows.tx, limit=8)) == 5
    assert rows.states(meek) == {"queued": 5}


def test_a_queue_nobody_listens_to_does_not_fill_the_window(rows):
    rows.worker("default", concurrency=10)
    run = rows.run(max_active_tasks=4)
    rows.tasks(run, 100, queue="gpu", priority=1000)
    wanted = rows.tasks(run, 3)
    assert sorted(admitted(rows.tx, limit=4)) == wanted


def test_priority_goes_first_then_the_older_run(rows):
    rows.worker("default", concurrency=4)
    young, old = rows.run(age_seconds=1), rows.run(age_seconds=100)
    late, early, urgent = rows.tasks(young, 2), rows.tasks(old, 2), rows.tasks(young, 1, priority=5)
    assert admitted(rows.tx, limit=2) == [*urgent, early[0]]
    assert sorted(admitted(rows.tx, limit=2)) == sorted([early[1], late[0]])


def test_tasks_of_a_paused_dag_or_of_another_executor_stay(rows):
    rows.worker("default")
    rows.dag("paused", is_paused=True)
    rows.tasks(rows.run("paused"), 2)
    rows.tasks(rows.run(), 2, executor="LocalExecutor")
    (mine,) = rows.tasks(rows.run(), 1, executor="CeleryExecutor")
    assert admitted(rows.tx) == [mine]


def test_a_local_executors_worker_takes_from_every_queue(rows):
    rows.worker("*", concurrency=3, executor="LocalExecutor")
    run = rows.run()
    rows.tasks(run, 2, queue="a")
    rows.tasks(run, 2, queue="b")
    assert len(admitted(rows.tx, executor="LocalExecutor")) == 3


def test_two_schedulers_admitting_at_once_do_not_overbook(store):
    with store.begin() as tx:
        rows = Rows(tx)
        rows.dag()
        rows.worker("default", concurrency=1000)
        rows.pool("etl", 10)
        run = rows.run(max_active_tasks=1000)
        rows.tasks(run, 200, pool="etl")
    barrier = threading.Barrier(4)

    def scheduler():
        barrier.wait(timeout=30)
        for _ in range(5):
            with store.begin() as tx:
                admitted(tx, limit=3)

    threads = [threading.Thread(target=scheduler) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with store.begin() as tx:
        assert Rows(tx).states(run) == {"queued": 10, "scheduled": 190}

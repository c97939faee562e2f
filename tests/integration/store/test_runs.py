"""Runs: created whole, started within limits, planned by one scheduler at a time, cancelled, ended."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from sqlalchemy import text

from dflow.core.errors import ConflictError, NotFoundError, SerializationError
from dflow.core.spec import DagSpec, TaskSpec
from dflow.core.states import Reason, RunState, RunType, TaskState
from dflow.store import dags, events, runs, tasks
from dflow.store.runs import Affinity, NewRun

from .world import T0, add_dag, add_run, add_worker, day, ids, move, queue, spec, start, with_tasks

pytestmark = pytest.mark.integration


@pytest.fixture
def tx(store):
    with store.begin() as tx:
        yield tx


def begin_all(tx):
    return {run.run_id: run for run in runs.start_queued(tx, 100)}


# Creating


def test_a_run_comes_with_all_its_task_instances(tx):
    dag = with_tasks(
        spec(max_active_tasks=7, dagrun_timeout_seconds=90.0),
        retries=2, pool="p", pool_slots=3, queue="q", executor="X", effective_priority=11,
    )  # fmt: skip
    version = add_dag(tx, dag, path="sub/d.py").version_id
    run = runs.create(
        tx,
        dag_id="d",
        run_id=None,
        run_type=RunType.MANUAL,
        logical_date=day(1),
        data_interval_start=day(0),
        data_interval_end=day(1),
        run_after=day(1),
        conf={"n": [1, None]},
        triggered_by="ann",
    )
    assert run.run_id == "manual__2026-11-02T00:00:00+00:00"
    assert (run.state, run.run_type, run.version, run.conf) == ("queued", "manual", 0, {"n": [1, None]})
    assert (run.dag_version_id, run.bundle_hash, run.path) == (version, "h1", "sub/d.py")
    assert (run.max_active_tasks, run.timeout_seconds, run.triggered_by) == (7, 90.0, "ann")
    assert (run.data_interval_start, run.data_interval_end, run.logical_date) == (day(0), day(1), day(1))
    made = tasks.list_for_run(tx, run.id)
    assert [(ti.task_id, ti.map_index, ti.state, ti.attempt_id) for ti in made] == [
        ("a", -1, "none", None),
        ("b", -1, "none", None),
    ]
    a = made[0]
    assert (a.retries, a.pool, a.pool_slots, a.queue, a.executor, a.priority_weight) == (2, "p", 3, "q", "X", 11)
    assert runs.get(tx, "d", run.run_id) == run == runs.get_by_id(tx, run.id)


def test_a_dag_without_tasks_has_runs(tx):
    add_dag(tx, DagSpec(dag_id="empty"))
    run = add_run(tx, "empty")
    assert tasks.list_for_run(tx, run.id) == []
    assert runs.state_counts(tx, run.id) == {}


def test_a_conflict_is_explained_and_leaves_the_transaction_usable(tx):
    add_dag(tx)
    add_run(tx, run_id="r", logical_date=day(0))
    with pytest.raises(ConflictError, match="already has a run 'r'"):
        add_run(tx, run_id="r", logical_date=day(1))
    with pytest.raises(ConflictError, match="logical date .*'r' \\(queued\\)"):
        add_run(tx, run_id="other", logical_date=day(0))
    add_run(tx, run_id="s")
    add_run(tx, run_id="t")  # no logical date conflicts with none
    assert tx.execute(text("SELECT count(*) FROM task_instance")).scalar_one() == 6


def test_unknown_inactive_and_nonsense_are_refused(tx):
    add_dag(tx, spec("tz_report"))
    with pytest.raises(NotFoundError, match="Did you mean 'tz_report'"):
        add_run(tx, "tz_repot")
    with pytest.raises(SerializationError, match="JSON"):
        add_run(tx, "tz_report", conf={"x": object()})
    with pytest.raises(SerializationError, match="NUL"):
        add_run(tx, "tz_report", conf={"x": "\x00"})
    dags.deactivate_missing(tx, bundle_name="dags", paths=[])
    with pytest.raises(ConflictError, match="not active"):
        add_run(tx, "tz_report")


def test_many_runs_leave_out_what_exists(tx):
    add_dag(tx)
    add_run(tx, run_id="x", logical_date=day(1))
    new = [
        NewRun(run_type=RunType.SCHEDULED, run_after=day(n), logical_date=day(n), triggered_by="timetable")
        for n in range(3)
    ]
    made = runs.create_many(tx, "d", new)
    assert [run.logical_date for run in made] == [day(0), day(2)]
    assert [run.run_id for run in made] == [
        "scheduled__2026-11-01T00:00:00+00:00",
        "scheduled__2026-11-03T00:00:00+00:00",
    ]
    assert runs.create_many(tx, "d", new) == []
    assert all(len(tasks.list_for_run(tx, run.id)) == 2 for run in made)


def test_two_creators_of_one_run_make_one(store):
    with store.begin() as tx:
        add_dag(tx)
    gate = threading.Barrier(2)
    results = []

    def create():
        try:
            with store.begin() as tx:
                tx.execute(text("SELECT 1"))
                gate.wait(30)
                results.append(add_run(tx, run_id="r").run_id)
        except ConflictError:
            results.append("conflict")

    threads = [threading.Thread(target=create) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == ["conflict", "r"]
    with store.begin() as tx:
        assert tx.execute(text("SELECT count(*) FROM task_instance")).scalar_one() == 2


def test_a_run_keeps_the_code_it_was_made_with(tx):
    add_dag(tx, bundle_hash="h1")
    run = add_run(tx)
    add_dag(tx, spec(task_ids=("a",)), bundle_hash="h2")
    assert runs.get_by_id(tx, run.id).bundle_hash == "h1"
    assert len(tasks.list_for_run(tx, run.id)) == 2
    assert len(dags.get_spec(tx, run.dag_version_id).tasks) == 2


# Starting


def test_oldest_first_within_max_active_runs(tx):
    add_dag(tx, spec(max_active_runs=2))
    for number in (3, 1, 2):
        add_run(tx, run_id=f"r{number}", run_after=day(-number))
    started = runs.start_queued(tx, 100)
    assert [run.run_id for run in started] == ["r3", "r2"]
    assert all(run.state == "running" and run.started_at and run.version == 1 for run in started)
    assert runs.start_queued(tx, 100) == []
    runs.end(tx, started[0].id, RunState.SUCCESS, None)
    assert [run.run_id for run in runs.start_queued(tx, 100)] == ["r1"]


def test_what_does_not_start(tx):
    for dag_id in ("paused", "gone", "future", "fine"):
        add_dag(tx, spec(dag_id), path=f"{dag_id}.py")
    for dag_id in ("paused", "gone", "fine"):
        add_run(tx, dag_id)
    add_run(tx, "future", run_after=day(36_500))
    dags.set_paused(tx, ["paused"], True)
    dags.deactivate_others_in_file(tx, bundle_name="dags", path="gone.py", keep=[])
    assert [run.dag_id for run in runs.start_queued(tx, 100)] == ["fine"]


def test_a_future_run_does_not_hide_due_ones(tx):
    add_dag(tx)
    add_run(tx, run_id="future", run_after=day(36_500))
    add_run(tx, run_id="due")
    assert list(begin_all(tx)) == ["due"]


def test_the_limit_is_shared_by_all_dags_oldest_first(tx):
    for number in range(3):
        add_dag(tx, spec(f"d{number}"))
        add_run(tx, f"d{number}", run_after=day(-number))
    assert [run.dag_id for run in runs.start_queued(tx, 2)] == ["d2", "d1"]
    assert [run.dag_id for run in runs.start_queued(tx, 2)] == ["d0"]


def test_timeout_runs_from_the_start(tx):
    add_dag(tx, spec("slow", dagrun_timeout_seconds=60.0))
    add_dag(tx, spec("free"))
    add_run(tx, "slow")
    add_run(tx, "free")
    started = {run.dag_id: run for run in runs.start_queued(tx, 100)}
    assert (started["slow"].timeout_at - started["slow"].started_at).total_seconds() == 60
    assert started["free"].timeout_at is None


def test_two_schedulers_do_not_start_too_many(store):
    with store.begin() as tx:
        add_dag(tx, spec(max_active_runs=1))
        for _ in range(5):
            add_run(tx)
    with store.begin() as one, store.begin() as other:
        assert len(runs.start_queued(one, 100)) == 1
        assert runs.start_queued(other, 100) == []  # its DAG is locked by the first
    gate = threading.Barrier(4)

    def start_some():
        gate.wait(30)
        for _ in range(10):
            store.run(lambda tx: runs.start_queued(tx, 100))

    with store.begin() as tx:
        tx.execute(text("UPDATE dag SET max_active_runs = 3"))
    threads = [threading.Thread(target=start_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with store.begin() as tx:
        assert len(runs.list_(tx, states=[RunState.RUNNING])) == 3


# Planning


def test_only_runs_with_ends_are_locked_and_by_one_scheduler(store):
    with store.begin() as tx:
        add_dag(tx)
        busy, idle = add_run(tx), add_run(tx)
        begin_all(tx)
        move(tx, ids(tx, busy)["a"], TaskState.SKIPPED)
    with store.begin() as one, store.begin() as other:
        assert [run.id for run in runs.lock_for_planning(one, 10)] == [busy.id]
        assert runs.lock_for_planning(other, 10) == []
        assert [run.id for run in runs.lock(other, [busy.id, idle.id])] == [idle.id]
        taken = runs.take_inbox(one, [busy.id])
        assert taken == [(busy.id, ids(one, busy)["a"], "skipped")]
    with store.begin() as tx:
        assert runs.lock_for_planning(tx, 10) == []
        assert runs.inbox_size(tx) == 0


def test_ends_come_in_the_order_they_happened(tx):
    add_dag(tx)
    run = add_run(tx)
    a, b = ids(tx, run)["a"], ids(tx, run)["b"]
    for ti_id, state in ((b, TaskState.FAILED), (a, TaskState.SUCCESS), (b, TaskState.SKIPPED)):
        move(tx, ti_id, state)
    assert [(ti_id, state) for _, ti_id, state in runs.take_inbox(tx, [run.id])] == [
        (b, "failed"),
        (a, "success"),
        (b, "skipped"),
    ]


def test_a_rolled_back_pass_leaves_the_inbox(store):
    with store.begin() as tx:
        add_dag(tx)
        run = add_run(tx)
        move(tx, ids(tx, run)["a"], TaskState.SKIPPED)

    def take_and_fail():
        with store.begin() as tx:
            assert len(runs.take_inbox(tx, [run.id])) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        take_and_fail()
    with store.begin() as tx:
        assert len(runs.take_inbox(tx, [run.id])) == 1


def test_affinity_shares_runs_and_makes_up_for_the_missing(tx):
    add_dag(tx)
    made = [add_run(tx) for _ in range(4)]
    for run in made:
        move(tx, ids(tx, run)["a"], TaskState.SKIPPED)
    mine = [run.id for run in runs.lock_for_planning(tx, 10, Affinity(index=1, count=2, grace_seconds=60))]
    assert mine == [run.id for run in made if run.id % 2 == 1]
    everything = runs.lock_for_planning(tx, 10, Affinity(index=1, count=2, grace_seconds=0))
    assert [run.id for run in everything] == [run.id for run in made]


def test_view_and_version(tx):
    add_dag(tx)
    run = add_run(tx)
    named = ids(tx, run)
    move(tx, named["b"], TaskState.SCHEDULED)
    assert runs.load_view(tx, run.id) == [(named["a"], "a", -1, "none"), (named["b"], "b", -1, "scheduled")]
    assert runs.bump_version(tx, [run.id]) == {run.id: 1}
    assert runs.bump_version(tx, [run.id]) == {run.id: 2}
    assert runs.get_by_id(tx, run.id).version == 2


# Ending


def test_a_run_ends_once(tx):
    add_dag(tx)
    run = add_run(tx)
    begin_all(tx)
    assert runs.end(tx, run.id, RunState.FAILED, "why") is RunState.FAILED
    assert runs.end(tx, run.id, RunState.SUCCESS, None) is None
    ended = runs.get_by_id(tx, run.id)
    assert (ended.state, ended.cause, ended.is_ended) == ("failed", "why", True)
    assert ended.ended_at >= ended.started_at
    assert ended.version == 2


def test_cancel_skips_what_waits_and_tells_what_runs(tx):
    add_dag(tx, spec(task_ids=("a", "b", "c", "d", "e")))
    run = add_run(tx)
    begin_all(tx)
    named = ids(tx, run)
    worker = add_worker(tx)
    move(tx, named["a"], TaskState.SUCCESS)
    start(tx, named["b"], worker)
    queue(tx, named["c"])
    move(tx, named["d"], TaskState.SCHEDULED)
    cancelled = runs.cancel(tx, "d", run.run_id, "ann")
    assert (cancelled.state, cancelled.cancelled_by, cancelled.cause) == ("running", "ann", "cancelled by ann")
    assert {ti.task_id: ti.state for ti in tasks.list_for_run(tx, run.id)} == {
        "a": "success", "b": "running", "c": "skipped", "d": "skipped", "e": "skipped",
    }  # fmt: skip
    b = tasks.get_by_id(tx, named["b"])
    assert b.cancel_requested_at is not None
    assert b.cancelled_by == "ann"
    assert tasks.get_by_id(tx, named["a"]).cancel_requested_at is None
    last = events.list_for_ti(tx, named["c"])[-1]
    assert (last.reason, last.cause, last.actor) == ("cancelled", "cancelled by ann", "user ann")
    assert last.attempt_id is not None
    # Its last task ends; whatever the planner says, a cancelled run has failed.
    move(tx, named["b"], TaskState.FAILED, reason=Reason.CANCELLED)
    assert runs.end(tx, run.id, RunState.SUCCESS, None) is RunState.FAILED
    assert runs.get_by_id(tx, run.id).cause == "cancelled by ann"


def test_cancel_with_nothing_running_ends_the_run(tx):
    add_dag(tx)
    run = add_run(tx)
    ended = runs.cancel(tx, "d", run.run_id, "ann")
    assert (ended.state, ended.cause) == ("failed", "cancelled by ann")
    assert runs.state_counts(tx, run.id) == {"skipped": 2}
    assert runs.start_queued(tx, 10) == []
    with pytest.raises(ConflictError, match="ended already"):
        runs.cancel(tx, "d", run.run_id, "ann")


def test_cancel_twice_keeps_who_was_first(tx):
    add_dag(tx)
    run = add_run(tx)
    begin_all(tx)
    start(tx, ids(tx, run)["a"], add_worker(tx))
    runs.cancel(tx, "d", run.run_id, "ann")
    assert runs.cancel(tx, "d", run.run_id, "bob").cancelled_by == "ann"


def test_cancel_waits_for_a_claim_and_then_tells_it(store):
    """Between reading a queued task and skipping it, a worker claims it: the lock makes one of the two wait."""
    with store.begin() as tx:
        add_dag(tx)
        run = add_run(tx)
        begin_all(tx)
        a = ids(tx, run)["a"]
        queue(tx, a)
        worker = add_worker(tx)
    done = threading.Event()

    def cancel():
        store.run(lambda tx: runs.cancel(tx, "d", run.run_id, "ann"))
        done.set()

    thread = threading.Thread(target=cancel)
    with store.begin() as claimer:
        move(claimer, a, TaskState.RUNNING, worker_id=worker.id, hostname="h", pid=1)
        thread.start()
        assert not done.wait(0.2)
    thread.join(60)
    with store.begin() as tx:
        ti = tasks.get_by_id(tx, a)
        assert ti.state == "running"
        assert ti.cancelled_by == "ann"


def test_timed_out_runs_are_stopped_once(store):
    with store.begin() as tx:
        add_dag(tx, spec(dagrun_timeout_seconds=60.0))
        run = add_run(tx)
        begin_all(tx)
        start(tx, ids(tx, run)["a"], add_worker(tx))
        assert runs.timed_out(tx) == []
        tx.execute(text("UPDATE dag_run SET timeout_at = now() - interval '1 second'"))
    with store.begin() as one, store.begin() as other:
        (late,) = runs.timed_out(one)
        assert runs.timed_out(other) == []
        stopped = runs.stop(one, late, actor="scheduler", reason=Reason.RUN_TIMEOUT, cause="60 s have passed")
        assert (stopped.state, stopped.cause) == ("running", "60 s have passed")
    with store.begin() as tx:
        assert runs.timed_out(tx) == []
        assert runs.state_counts(tx, run.id) == {"running": 1, "skipped": 1}


# Reading


def test_lists_and_counts(tx):
    for dag_id in ("one", "two"):
        add_dag(tx, spec(dag_id))
    made = [add_run(tx, dag_id) for dag_id in ("one", "two", "one")]
    runs.end(tx, made[0].id, RunState.FAILED, "x")
    assert [run.id for run in runs.list_(tx)] == [run.id for run in reversed(made)]
    assert [run.id for run in runs.list_(tx, dag_id="one")] == [made[2].id, made[0].id]
    assert [run.id for run in runs.list_(tx, dag_id="one", states=[RunState.FAILED])] == [made[0].id]
    assert [run.id for run in runs.list_(tx, states=[RunState.QUEUED], limit=1)] == [made[2].id]
    move(tx, ids(tx, made[1])["a"], TaskState.SCHEDULED)
    assert runs.state_counts(tx, made[1].id) == {"none": 1, "scheduled": 1}
    assert runs.state_counts_of(tx, [made[0].id, made[1].id]) == {
        made[0].id: {"none": 2},
        made[1].id: {"none": 1, "scheduled": 1},
    }


def test_unknown_runs_get_a_suggestion(tx):
    add_dag(tx)
    add_run(tx, run_id="nightly_1")
    with pytest.raises(NotFoundError, match="Did you mean 'nightly_1'"):
        runs.get(tx, "d", "nightly1")
    with pytest.raises(NotFoundError, match="no DAG 'e'"):
        runs.get(tx, "e", "nightly_1")


def test_the_spec_cache_never_mixes_versions(tx):
    first = add_dag(tx, DagSpec(dag_id="d", tasks=(TaskSpec(task_id="x", operator="Op"),)))
    second = add_dag(tx, replace(spec(), dag_id="d"))
    assert [task.task_id for task in dags.get_spec(tx, first.version_id).tasks] == ["x"]
    assert [task.task_id for task in dags.get_spec(tx, second.version_id).tasks] == ["a", "b"]
    assert T0.tzinfo is not None

"""Task instances as read by people, agents and timers."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy import text

from dflow.core.errors import NotFoundError
from dflow.core.states import Reason, TaskState
from dflow.core.timetable import DueRun
from dflow.runtime.protocol import Work
from dflow.store import attempts, dags, events, runs, tasks

from .world import add_dag, add_run, add_worker, day, ids, move, queue, spec, start, with_tasks

pytestmark = pytest.mark.integration


@pytest.fixture
def tx(store):
    with store.begin() as tx:
        yield tx


@pytest.fixture
def run(tx):
    add_dag(tx, with_tasks(spec(task_ids=("a", "b", "c")), retries=2))
    add_run(tx)
    return runs.start_queued(tx, 1)[0]


def published_before(tx, ti_id, seconds, count=1):
    tx.execute(
        text(
            "UPDATE task_instance SET published_at = now() - make_interval(secs => :s), publish_count = :c"
            " WHERE id = :i"
        ),
        {"i": ti_id, "s": seconds, "c": count},
    )


def test_get_by_names(tx, run):
    assert tasks.get(tx, "d", run.run_id, "b").id == ids(tx, run)["b"]
    with pytest.raises(NotFoundError, match="Did you mean 'b'"):
        tasks.get(tx, "d", run.run_id, "bb")
    with pytest.raises(NotFoundError, match="map index 3"):
        tasks.get(tx, "d", run.run_id, "b", 3)
    with pytest.raises(NotFoundError, match="no run"):
        tasks.get(tx, "d", "x", "b")
    assert tasks.get_by_id(tx, 0) is None
    assert tasks.states(tx, run.id, ["a", "c", "zz"]) == {"a": "none", "c": "none"}


def test_a_claimed_attempt_is_described_as_work(tx, run):
    named = ids(tx, run)
    attempt_id = start(tx, named["a"], add_worker(tx))
    (claimed,) = tasks.describe_claimed(tx, named.values())
    work = Work(**{name: getattr(claimed, name) for name in tasks.Claimed.__slots__})
    assert (work.ti_id, work.attempt_id, work.run_id, work.task_id) == (named["a"], attempt_id, run.run_id, "a")
    assert (work.try_number, work.retries, work.hostname, work.bundle_hash) == (1, 2, "host", "h1")
    assert set(tasks.Claimed.__slots__) == set(Work.__slots__)


def test_due_retries(tx, run):
    named, worker = ids(tx, run), add_worker(tx)
    for name, delay in (("a", -5.0), ("b", 3600.0), ("c", -9.0)):
        start(tx, named[name], worker)
        move(tx, named[name], TaskState.UP_FOR_RETRY, delay_seconds=delay, user_failure=True, reason=Reason.RAISED)
    due = tasks.due_retries(tx, 10)
    assert [(one.task_id, one.state, one.is_cancelled) for one in due] == [
        ("c", "up_for_retry", False),
        ("a", "up_for_retry", False),
    ]
    assert due[0].attempt_id == tasks.get_by_id(tx, named["c"]).attempt_id
    assert len(tasks.due_retries(tx, 1)) == 1
    assert tasks.next_wakeup(tx) < datetime.now(UTC)


def test_a_retry_that_comes_due_in_a_stopping_run_says_so(tx, run):
    named, worker = ids(tx, run), add_worker(tx)
    start(tx, named["a"], worker)
    runs.cancel(tx, "d", run.run_id, "ann")
    move(tx, named["a"], TaskState.UP_FOR_RETRY, delay_seconds=-1.0, infra_failure=True)
    assert [one.is_cancelled for one in tasks.due_retries(tx, 10)] == [True]


def test_due_retries_go_to_one_scheduler(store):
    with store.begin() as tx:
        add_dag(tx)
        run = add_run(tx)
        a = ids(tx, run)["a"]
        start(tx, a, add_worker(tx))
        move(tx, a, TaskState.UP_FOR_RETRY, delay_seconds=-1.0)
    with store.begin() as one, store.begin() as other:
        assert len(tasks.due_retries(one, 10)) == 1
        assert tasks.due_retries(other, 10) == []


def test_next_wakeup_is_the_earliest_of_all(tx, run):
    assert tasks.next_wakeup(tx) is None
    dags.set_next_run(
        tx, "d", DueRun(logical_date=day(9), interval_start=day(9), interval_end=day(9), run_after=day(9))
    )
    assert tasks.next_wakeup(tx) == day(9)
    tx.execute(text("UPDATE dag_run SET timeout_at = :t"), {"t": day(8)})
    assert tasks.next_wakeup(tx) == day(8)
    a = ids(tx, run)["a"]
    start(tx, a, add_worker(tx))
    move(tx, a, TaskState.UP_FOR_RETRY, not_before=day(7))
    assert tasks.next_wakeup(tx) == day(7)


def test_unclaimed_messages_are_published_again_with_patience(tx, run):
    named = ids(tx, run)
    attempt_id = queue(tx, named["a"])
    queue(tx, named["b"])
    start(tx, named["c"], add_worker(tx))
    assert tasks.unpublished(tx, 5.0, 10) == []  # just admitted
    tx.execute(text("UPDATE task_instance SET queued_at = now() - interval '6 seconds'"))
    nudges = tasks.unpublished(tx, 5.0, 10)
    assert [nudge.task_id for nudge in nudges] == ["a", "b"]  # c runs
    assert (nudges[0].attempt_id, nudges[0].run_id, nudges[0].queue) == (attempt_id, run.run_id, "default")
    tasks.mark_published(tx, [named["b"], named["a"], named["c"], named["a"]])
    assert tasks.unpublished(tx, 5.0, 10) == []
    assert tasks.get_by_id(tx, named["a"]).publish_count == 1
    assert tasks.get_by_id(tx, named["c"]).publish_count == 0
    published_before(tx, named["a"], 6, count=1)
    published_before(tx, named["b"], 6, count=2)  # the second time it waits twice as long
    assert [nudge.task_id for nudge in tasks.unpublished(tx, 5.0, 10)] == ["a"]
    published_before(tx, named["b"], 161, count=40)  # but never more than 32 times as long
    assert [nudge.task_id for nudge in tasks.unpublished(tx, 5.0, 10)] == ["a", "b"]
    assert len(tasks.unpublished(tx, 5.0, 1)) == 1


def test_tasks_of_another_executor_are_not_published_here(tx):
    add_dag(tx, with_tasks(spec(task_ids=("a",)), executor="LocalExecutor"))
    queue(tx, ids(tx, add_run(tx))["a"])
    tx.execute(text("UPDATE task_instance SET queued_at = now() - interval '6 seconds'"))
    assert tasks.unpublished(tx, 5.0, 10, executor="CeleryExecutor") == []
    assert len(tasks.unpublished(tx, 5.0, 10, executor="LocalExecutor")) == 1
    assert len(tasks.unpublished(tx, 5.0, 10)) == 1


def test_a_cause_may_hold_anything(tx, run):
    a = ids(tx, run)["a"]
    move(tx, a, TaskState.FAILED, cause="ValueError: \x00 \udc80 é")
    assert tasks.get_by_id(tx, a).cause == "ValueError: \ufffd ? é"


def test_active_counts(tx, run):
    named, worker = ids(tx, run), add_worker(tx)
    start(tx, named["a"], worker)
    queue(tx, named["b"])
    move(tx, named["c"], TaskState.SCHEDULED)
    assert tasks.active_counts(tx) == {"running": 1, "queued": 1, "scheduled": 1}


def test_tries_and_events(tx, run):
    a, worker = ids(tx, run)["a"], add_worker(tx)
    assert attempts.latest(tx, a) is None
    first = start(tx, a, worker)
    move(tx, a, TaskState.UP_FOR_RETRY, delay_seconds=0.0, reason=Reason.SIGNALLED, exit_code=-9, peak_rss_bytes=5)
    for state in (TaskState.SCHEDULED, TaskState.QUEUED):
        move(tx, a, state)
    second = move(tx, a, TaskState.RUNNING, worker_id=worker.id, hostname="host", pid=8).attempt_id
    tries = attempts.list_for_ti(tx, a)
    assert [(one.id, one.try_number, one.state, one.exit_code, one.pid) for one in tries] == [
        (first, 1, "up_for_retry", -9, 7),
        (second, 2, "running", None, 8),
    ]
    assert tries[0].ended_at is not None
    assert tries[1].ended_at is None
    assert attempts.get(tx, a, 1) == tries[0]
    assert attempts.latest(tx, a) == tries[1]
    with pytest.raises(NotFoundError, match="tries: 1, 2"):
        attempts.get(tx, a, 3)
    move(tx, a, TaskState.SUCCESS)
    assert [one.state for one in attempts.list_for_ti(tx, a)] == ["up_for_retry", "success"]
    history = events.list_for_ti(tx, a)
    assert [event.to_state for event in history][:4] == ["scheduled", "queued", "running", "up_for_retry"]
    assert events.list_for_run(tx, run.id) == history
    assert events.list_for_run(tx, run.id, after_id=history[-2].id) == history[-1:]

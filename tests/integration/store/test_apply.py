"""The one statement that writes state: the fence, the side rows, and the races it settles."""

from __future__ import annotations

import threading
import uuid

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from dflow.core.states import Reason, TaskState
from dflow.store.apply import Change, apply

from .rows import Rows

pytestmark = pytest.mark.integration
N, S, Q, R = TaskState.NONE, TaskState.SCHEDULED, TaskState.QUEUED, TaskState.RUNNING


def change(ti_id, from_state, to_state, *, attempt=None, reason=Reason.READY, **more):
    return Change(
        ti_id=ti_id, from_state=from_state, to_state=to_state, reason=reason, attempt_id=attempt, actor="test", **more
    )


@pytest.fixture
def ti(store):
    with store.begin() as tx:
        rows = Rows(tx)
        rows.dag()
        return rows.tasks(rows.run(), state="none")[0]


def walk_to_running(store, ti_id):
    worker = str(uuid.uuid4())
    with store.begin() as tx:
        apply(tx, [change(ti_id, N, S)])
        (queued,) = apply(tx, [change(ti_id, S, Q)])
        apply(tx, [change(ti_id, Q, R, attempt=queued.attempt_id, worker_id=worker, hostname="h", pid=7)])
    return queued.attempt_id


def row(store, ti_id):
    with store.begin() as tx:
        return tx.execute(text("SELECT * FROM task_instance WHERE id = :i"), {"i": ti_id}).one()


def test_a_walk_to_success_leaves_one_event_per_step_one_attempt_and_one_inbox_row(store, ti):
    attempt = walk_to_running(store, ti)
    with store.begin() as tx:
        apply(tx, [change(ti, R, TaskState.SUCCESS, attempt=attempt, reason=Reason.SUCCEEDED, peak_rss_bytes=5)])
        events = tx.execute(text("SELECT from_state, to_state, attempt_id::text FROM ti_event ORDER BY id")).all()
        ended = tx.execute(text("SELECT * FROM attempt")).one()
        inbox = tx.execute(text("SELECT ti_id, state FROM unaccounted")).all()
    steps = [("none", "scheduled"), ("scheduled", "queued"), ("queued", "running"), ("running", "success")]
    assert [event[:2] for event in events] == steps
    assert [event[2] for event in events[1:]] == [attempt] * 3
    assert (str(ended.id), ended.try_number, ended.state, ended.pid, ended.peak_rss_bytes) == (
        attempt, 1, "success", 7, 5,
    )  # fmt: skip
    assert inbox == [(ti, "success")]


def test_a_second_claim_of_the_same_attempt_changes_nothing(store, ti):
    attempt = walk_to_running(store, ti)
    with store.begin() as tx:
        assert apply(tx, [change(ti, Q, R, attempt=attempt, worker_id=str(uuid.uuid4()))]) == []
    assert row(store, ti).try_number == 1


def test_a_finish_with_a_superseded_attempt_changes_nothing(store, ti):
    first = walk_to_running(store, ti)
    with store.begin() as tx:
        apply(tx, [change(ti, R, TaskState.UP_FOR_RETRY, attempt=first, infra_failure=True, reason=Reason.LEASE_LOST)])
        apply(tx, [change(ti, TaskState.UP_FOR_RETRY, S, attempt=first, reason=Reason.RETRY_DUE)])
        (again,) = apply(tx, [change(ti, S, Q)])
        apply(tx, [change(ti, Q, R, attempt=again.attempt_id)])
    with store.begin() as tx:
        assert apply(tx, [change(ti, R, TaskState.SUCCESS, attempt=first, reason=Reason.SUCCEEDED)]) == []
    now = row(store, ti)
    assert (now.state, now.try_number, now.user_failures, now.infra_failures) == ("running", 2, 0, 1)
    assert str(now.attempt_id) == again.attempt_id != first


def test_two_finishes_racing_for_one_attempt_let_one_win(store, ti):
    attempt = walk_to_running(store, ti)
    barrier, results = threading.Barrier(2), []

    def finish(state, reason):
        with store.begin() as tx:
            tx.execute(text("SELECT 1"))
            barrier.wait(timeout=30)
            results.append(apply(tx, [change(ti, R, state, attempt=attempt, reason=reason)]))

    threads = [
        threading.Thread(target=finish, args=(TaskState.SUCCESS, Reason.SUCCEEDED)),
        threading.Thread(target=finish, args=(TaskState.FAILED, Reason.RAISED)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(len(result) for result in results) == [0, 1]
    with store.begin() as tx:
        assert Rows(tx).count("unaccounted") == Rows(tx).count("attempt") == 1


def test_the_planners_own_ends_stay_out_of_the_inbox(store, ti):
    with store.begin() as tx:
        apply(tx, [change(ti, N, TaskState.SKIPPED, reason=Reason.TRIGGER_RULE, account=False)])
        assert Rows(tx).count("unaccounted") == 0


def test_a_delay_is_counted_from_the_databases_clock(store, ti):
    attempt = walk_to_running(store, ti)
    with store.begin() as tx:
        apply(tx, [change(ti, R, TaskState.UP_FOR_RETRY, attempt=attempt, delay_seconds=60.0, user_failure=True)])
        waits = tx.execute(
            text("SELECT extract(epoch FROM not_before - clock_timestamp()) FROM task_instance")
        ).scalar()
    assert 55 < waits <= 60
    assert row(store, ti).user_failures == 1


def test_results_of_an_earlier_try_are_forgotten_when_the_next_one_starts(store, ti):
    attempt = walk_to_running(store, ti)
    with store.begin() as tx:
        tx.execute(
            text(
                "INSERT INTO xcom (run_pk, task_id, map_index, key, value)"
                " SELECT run_pk, task_id, map_index, 'return_value', '1' FROM task_instance"
            )
        )
        apply(tx, [change(ti, R, TaskState.UP_FOR_RETRY, attempt=attempt, user_failure=True)])
        apply(tx, [change(ti, TaskState.UP_FOR_RETRY, S, attempt=attempt)])
        (again,) = apply(tx, [change(ti, S, Q)])
        assert Rows(tx).count("xcom") == 1
        apply(tx, [change(ti, Q, R, attempt=again.attempt_id)])
        assert Rows(tx).count("xcom") == 0


def test_the_database_refuses_an_illegal_transition_whoever_asks(store, ti):
    with pytest.raises(IntegrityError, match="illegal transition"), store.begin() as tx:
        apply(tx, [change(ti, N, R)])
    assert row(store, ti).state == "none"


def test_one_statement_takes_hundreds_of_changes(store):
    with store.begin() as tx:
        rows = Rows(tx)
        rows.dag()
        run = rows.run()
        ids = rows.tasks(run, 700, state="none")
        assert len(apply(tx, [change(ti_id, N, S) for ti_id in ids])) == 700
        assert rows.states(run) == {"scheduled": 700}

"""Leases: renewed by agents, judged by the database's clock, rescued once."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import text

from dflow.core.errors import ConflictError
from dflow.store import runs, services, tasks, workers
from dflow.store.workers import WorkerStats

from .world import add_dag, add_run, add_worker, ids, queue, spec, start

pytestmark = pytest.mark.integration


@pytest.fixture
def tx(store):
    with store.begin() as tx:
        yield tx


def end_lease(tx, worker, seconds_ago=1.0):
    """Move the lease into the past; it is so short that the test's young database has been up for one."""
    tx.execute(
        text(
            "UPDATE worker SET lease_seconds = 0.001, lease_until = clock_timestamp() - make_interval(secs => :s)"
            " WHERE id = CAST(:i AS uuid)"
        ),
        {"i": worker.id, "s": seconds_ago},
    )


def running(tx, *names, worker):
    add_dag(tx, spec(task_ids=names))
    run = add_run(tx)
    named = ids(tx, run)
    return run, {name: (named[name], start(tx, named[name], worker)) for name in names}


def test_register_and_renew(tx):
    worker = add_worker(tx, queues=["a", "b"], lease_seconds=30.0)
    assert (worker.state, worker.queues, worker.claimed) == ("live", ["a", "b"], 0)
    tx.execute(text("UPDATE worker SET lease_until = clock_timestamp()"))
    renewal = workers.renew(tx, worker.id, 30.0, WorkerStats(claimed=5, concurrency=2, queues=["a"]))
    assert (renewal.ok, renewal.state, renewal.attempts) == (True, "live", [])
    (row,) = workers.list_(tx)
    assert (row.claimed, row.concurrency, row.queues) == (5, 2, ["a"])
    assert row.last_claim_at is not None
    assert row.lease_until > worker.started_at
    workers.renew(tx, worker.id, 30.0)
    assert workers.list_(tx)[0].last_claim_at == row.last_claim_at
    again = add_worker(tx, worker_id=worker.id, concurrency=9)
    assert (again.concurrency, again.claimed) == (9, 5)


def test_a_renewal_tells_what_runs_and_what_is_cancelled(tx):
    worker, other = add_worker(tx), add_worker(tx, "w2")
    run, started = running(tx, "a", "b", worker=worker)
    quiet = workers.renew(tx, worker.id, 30.0)
    assert {(one.ti_id, one.attempt_id) for one in quiet.attempts} == set(started.values())
    assert not any(one.cancel_requested for one in quiet.attempts)
    runs.cancel(tx, "d", run.run_id, "ann")
    told = workers.renew(tx, worker.id, 30.0).attempts
    assert {(one.cancel_requested, one.cancelled_by) for one in told} == {(True, "ann")}
    assert workers.renew(tx, other.id, 30.0).attempts == []


def test_draining_keeps_the_lease(tx):
    worker = add_worker(tx)
    assert workers.drain(tx, worker.id)
    assert not workers.drain(tx, worker.id)
    renewal = workers.renew(tx, worker.id, 30.0)
    assert (renewal.ok, renewal.state) == (True, "draining")
    assert [capacity.free for capacity in workers.list_live(tx)] == [0]


def test_who_is_gone_is_told_so(tx):
    worker = add_worker(tx)
    assert workers.deregister(tx, worker.id, "drained")
    assert not workers.deregister(tx, worker.id)
    for worker_id in (worker.id, str(uuid.uuid4())):
        renewal = workers.renew(tx, worker_id, 30.0)
        assert (renewal.ok, renewal.state) == (False, "gone")
    with pytest.raises(ConflictError, match="new id"):
        add_worker(tx, worker_id=worker.id)
    assert workers.list_(tx) == []
    assert [one.cause for one in workers.list_(tx, include_gone=True)] == ["drained"]


def test_expired_workers_lose_their_attempts_once(store):
    with store.begin() as tx:
        dead, alive = add_worker(tx, "dead"), add_worker(tx, "alive")
        run, started = running(tx, "a", "b", worker=dead)
        end_lease(tx, dead)
    with store.begin() as one, store.begin() as other:
        assert [worker.name for worker in workers.expire(one)] == ["dead"]
        assert workers.expire(other) == []
        lost = workers.lost_attempts(one, [dead.id])
        assert {(row.ti_id, row.attempt_id) for row in lost} == set(started.values())
        assert (lost[0].worker_name, lost[0].hostname, lost[0].is_cancelled) == ("dead", "host", False)
        assert "lease ended" in lost[0].cause
        assert workers.lost_attempts(other) == []
    with store.begin() as tx:
        assert workers.lost_attempts(tx, [alive.id]) == []
        assert len(workers.lost_attempts(tx)) == 2  # the rescuer that declared it gone died before it rescued
        assert not workers.renew(tx, dead.id, 30.0).ok


def test_a_late_renewal_wins_over_nobody(store):
    """The lease ended, but the agent renews before anybody acts: the worker lives, and a rescuer passes over it."""
    with store.begin() as tx:
        worker = add_worker(tx)
        end_lease(tx, worker)
    with store.begin() as agent, store.begin() as rescuer:
        assert workers.renew(agent, worker.id, 30.0).ok
        assert workers.expire(rescuer) == []
    with store.begin() as tx:
        assert workers.expire(tx) == []


def test_nobody_expires_right_after_the_database_came_back(tx):
    worker = add_worker(tx)
    end_lease(tx, worker)
    tx.execute(text("UPDATE worker SET lease_seconds = 1e6"))  # longer than this database has been up
    assert workers.expire(tx) == []


def test_attempts_of_a_worker_nobody_knows_are_lost(tx):
    worker = add_worker(tx)
    running(tx, "a", worker=worker)
    tx.execute(text("DELETE FROM worker"))
    (lost,) = workers.lost_attempts(tx)
    assert (lost.task_id, lost.worker_name, lost.cause) == ("a", None, None)


def test_capacity(tx):
    worker = add_worker(tx, "b", concurrency=3)
    add_worker(tx, "a", executor="LocalExecutor", queues=["*"])
    late = add_worker(tx, "late")
    end_lease(tx, late)
    running(tx, "a", "b", worker=worker)
    assert [(one.worker.name, one.running, one.free) for one in workers.list_live(tx)] == [("a", 0, 4), ("b", 2, 1)]
    assert [one.worker.name for one in workers.list_live(tx, "CeleryExecutor")] == ["b"]
    workers.renew(tx, worker.id, 30.0, WorkerStats(concurrency=1))
    assert workers.list_live(tx, "CeleryExecutor")[0].free == 0


def test_pruning_spares_who_is_still_named(tx):
    kept, dropped = add_worker(tx, "kept"), add_worker(tx, "dropped")
    running(tx, "a", worker=kept)
    for worker in (kept, dropped):
        workers.deregister(tx, worker.id)
    tx.execute(text("UPDATE worker SET ended_at = now() - interval '1 hour'"))
    assert workers.prune(tx, 7200) == 0
    assert workers.prune(tx, 60) == 1
    assert [worker.name for worker in workers.list_(tx, include_gone=True)] == ["kept"]


def test_services(tx):
    first, second = sorted(str(uuid.uuid4()) for _ in range(2))
    assert not services.heartbeat(tx, first)
    for service_id in (second, first):
        services.register(tx, service_id=service_id, kind="scheduler", hostname="h", pid=1, version="0")
    services.register(tx, service_id=str(uuid.uuid4()), kind="dag-processor", hostname="h", pid=2, version="0")
    assert [one.id for one in services.list_live(tx, "scheduler")] == [first, second]
    assert len(services.list_live(tx)) == 3
    assert services.heartbeat(tx, first, {"runs": 3})
    assert services.heartbeat(tx, first)
    assert services.list_live(tx, "scheduler")[0].info == {"runs": 3}
    services.deregister(tx, first)
    tx.execute(
        text("UPDATE service SET heartbeat_at = now() - interval '1 hour' WHERE id = CAST(:i AS uuid)"), {"i": second}
    )
    assert services.list_live(tx, "scheduler") == []
    assert len(services.list_(tx)) == 3
    assert services.prune(tx, 60) == 1
    assert tasks.active_counts(tx) == {}


def test_queued_work_is_not_a_workers_yet(tx):
    worker = add_worker(tx)
    add_dag(tx)
    queue(tx, ids(tx, add_run(tx))["a"])
    assert workers.renew(tx, worker.id, 30.0).attempts == []
    assert workers.lost_attempts(tx) == []

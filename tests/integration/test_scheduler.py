"""The scheduler's passes and services over a real database; the test plays the workers."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from dflow.broker.doorbell import LocalDoorbell
from dflow.core.errors import StoreUnavailableError
from dflow.core.spec import ScheduleSpec
from dflow.core.states import TaskState
from dflow.core.timetable import DueRun
from dflow.services import run_creator as run_creator_module
from dflow.services.affinity import Share
from dflow.services.heartbeat import ServiceHeartbeat
from dflow.services.rescuer import Rescuer
from dflow.services.run_creator import RunCreator
from dflow.services.run_timeouts import RunTimeouts
from dflow.services.scheduler import Scheduler
from dflow.services.sweeper import Sweeper
from dflow.settings import Settings
from dflow.store import dags, runs, schema
from dflow.store import scheduling as scheduling_module
from dflow.store.engine import Store
from tests.integration.scheduler_rig import FakeExecutor, SchedulerRig
from tests.support import Cluster, check_invariants, eventually

pytestmark = pytest.mark.integration
CHAIN = {"a": [], "b": ["a"], "c": ["b"]}


@pytest.fixture
def make_rig(
    make_settings: Callable[..., Settings], store: Store, tmp_path: Path
) -> Iterator[Callable[..., SchedulerRig]]:
    made: list[SchedulerRig] = []

    def make(values: dict[str, str] | None = None) -> SchedulerRig:
        made.append(SchedulerRig(make_settings(values), store, tmp_path))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., SchedulerRig]) -> SchedulerRig:
    rig = make_rig()
    rig.worker()
    return rig


@pytest.fixture
def doorbell(rig: SchedulerRig) -> LocalDoorbell:
    return rig.doorbell()


def passes(rig: SchedulerRig, scheduler: Scheduler, run_pk: int, limit: int = 50) -> int:
    """Pass and work until the run ends; return the number of passes."""
    for number in range(1, limit):
        scheduler.run_once()
        if rig.run(run_pk).ended_at is not None:
            return number
        rig.work(rig.executor.take())
    raise AssertionError(f"the run goes on: {rig.states(run_pk)}")


# --- passes


def test_a_chain_costs_one_pass_a_task(rig: SchedulerRig) -> None:
    rig.dag("d", CHAIN)
    run = rig.trigger("d")
    assert passes(rig, rig.scheduler(), run) == 4
    assert rig.run(run).state == "success"
    assert rig.states(run) == dict.fromkeys("abc", "success")
    assert rig.rows("SELECT * FROM unaccounted") == []


def test_reacting_to_an_end_reads_no_other_task_of_the_run(rig: SchedulerRig) -> None:
    width = 200
    rig.dag("d", {"a": [], "b": ["a"], **{f"w{n}": [] for n in range(width)}})
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    a = [nudge for nudge in rig.executor.take() if nudge.task_id == "a"]
    rig.work(a)
    statements: list[str] = []
    event.listen(rig.store.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    counts = scheduler.run_once()
    assert (counts["ends"], counts["planned"], counts["admitted"]) == (1, 1, 1)
    assert not [one for one in statements if "FROM task_instance WHERE run_pk" in one], "the view was loaded again"
    assert len(statements) <= 5, statements
    assert rig.states(run)["b"] == "queued"


def test_failures_skip_what_follows_and_the_run_fails_with_a_cause(rig: SchedulerRig) -> None:
    rig.dag("d", CHAIN)
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    rig.work(rig.executor.take(), TaskState.FAILED)
    counts = scheduler.run_once()
    assert counts["runs_ended"] == 1
    assert rig.states(run) == {"a": "failed", "b": "upstream_failed", "c": "upstream_failed"}
    assert rig.run(run).state == "failed"
    assert "a" in rig.run(run).cause


def test_a_pass_that_fails_changes_nothing_and_the_next_one_does_it_all(
    rig: SchedulerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.dag("d", CHAIN)
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    rig.work(rig.executor.take())

    def lost(*_: Any) -> None:
        raise StoreUnavailableError("the connection broke before the commit")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_admit", lost)
        with pytest.raises(StoreUnavailableError):
            scheduler.run_once()
    assert rig.states(run)["b"] == "none"
    scheduler.run_once()
    assert rig.states(run)["b"] == "queued"
    passes(rig, scheduler, run)
    with rig.store.begin() as tx:
        check_invariants(tx)


def test_a_copy_changed_by_a_pass_that_failed_is_never_used_again(
    rig: SchedulerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version alone would not tell: another scheduler counts it up to what the failed pass had counted to."""
    rig.dag("d", {"a": [], "b": ["a"], "c": []})
    run = rig.trigger("d")
    one, other = rig.scheduler(), rig.scheduler()
    one.run_once()
    nudges = {nudge.task_id: nudge for nudge in rig.executor.take()}
    rig.work([nudges["a"]], TaskState.FAILED)

    def lost(*_: Any) -> None:
        raise StoreUnavailableError("the connection broke before the commit")

    with monkeypatch.context() as patch:
        patch.setattr(scheduling_module, "has_scheduled", lost)
        with pytest.raises(StoreUnavailableError):
            one.run_once()  # has decided that b is upstream_failed
    rig.execute("UPDATE task_instance SET state = 'none', attempt_id = NULL WHERE task_id = 'a'")  # cleared meanwhile
    rig.execute("UPDATE unaccounted SET state = 'none'")
    assert other.run_once()["planned"] == 1, "a, once more"
    rig.work(rig.executor.take())
    one.run_once()
    assert rig.states(run) == {"a": "success", "b": "queued", "c": "queued"}


def test_somebody_faster_than_a_decision_is_seen_in_the_same_pass(rig: SchedulerRig) -> None:
    rig.dag("d", {"a": [], "b": ["a"]})
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    rig.execute("UPDATE task_instance SET state = 'skipped', ended_at = now() WHERE task_id = 'b'")  # with psql
    rig.work(rig.executor.take())
    assert scheduler.run_once()["runs_ended"] == 1
    assert rig.run(run).state == "success"


def test_a_copy_another_scheduler_made_stale_is_loaded_anew(rig: SchedulerRig) -> None:
    rig.dag("d", {"a": [], "b": [], "c": ["a", "b"]})
    run = rig.trigger("d")
    one, other = rig.scheduler(), rig.scheduler()
    one.run_once()
    a, b = sorted(rig.executor.take(), key=lambda nudge: nudge.task_id)
    rig.work([a])
    assert other.run_once()["ends"] == 1
    rig.work([b])
    assert one.run_once()["planned"] == 1, "it has not heard of a's end, which the other one accounted"
    assert rig.states(run)["c"] == "queued"


def test_schedulers_side_by_side_account_every_end_once(rig: SchedulerRig) -> None:
    for number in range(6):
        rig.dag(f"d{number}", {"a": [], **{f"m{n}": ["a"] for n in range(8)}, "z": [f"m{n}" for n in range(8)]})
    run_pks = [rig.trigger(f"d{number}") for number in range(6)]
    executors = [FakeExecutor() for _ in range(3)]
    schedulers = [rig.scheduler(executor) for executor in executors]
    errors: list[Exception] = []
    done = threading.Event()

    def run(scheduler: Scheduler) -> None:
        try:
            while not done.is_set():
                scheduler.run_once()
        except Exception as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(scheduler,)) for scheduler in schedulers]
    for thread in threads:
        thread.start()
    try:

        def all_ended() -> bool:
            assert not errors, errors
            for executor in executors:
                rig.work(executor.take())
            return all(rig.run(run_pk).ended_at for run_pk in run_pks)

        eventually(all_ended, 60, interval_seconds=0.005)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert {rig.run(run_pk).state for run_pk in run_pks} == {"success"}
    starts = rig.rows("SELECT ti_id FROM ti_event WHERE to_state = 'queued' GROUP BY ti_id HAVING count(*) <> 1")
    assert starts == [], "admitted more than once"
    with rig.store.begin() as tx:
        check_invariants(tx)


def test_each_of_two_schedulers_takes_its_share_and_looks_after_the_other(rig: SchedulerRig) -> None:
    rig.dag("d", CHAIN)
    run_pks = [rig.trigger("d", number) for number in range(4)]
    hearts = [ServiceHeartbeat(rig.store, "scheduler") for _ in range(2)]
    for heart in hearts:
        heart.beat()
    one, other = (rig.scheduler(share=Share("scheduler", heart.service_id)) for heart in hearts)
    one.run_once()
    other.run_once()
    rig.work(rig.executor.take())
    counts = [one.run_once()["ends"], other.run_once()["ends"]]
    assert counts == [2, 2], "the ends of each went to the scheduler whose they are"
    rig.work(rig.executor.take())
    ended = [0]

    def alone() -> bool:  # the other one is gone; its runs are seen to all the same
        ended[0] += one.run_once()["ends"]
        return ended[0] == 4

    eventually(alone, 20)
    assert {rig.states(run_pk)["c"] for run_pk in run_pks} == {"queued"}


def test_a_run_that_ends_makes_room_for_the_next_at_once(rig: SchedulerRig) -> None:
    rig.dag("d", {"a": []}, max_active_runs=1)
    first, second = rig.trigger("d", 1), rig.trigger("d", 2)
    scheduler = rig.scheduler()
    scheduler.run_once()
    assert (rig.run(first).state, rig.run(second).state) == ("running", "queued")
    rig.work(rig.executor.take())
    counts = scheduler.run_once()
    scheduler.wait(counts)  # returns at once: nobody rings
    scheduler.run_once()
    assert (rig.run(first).state, rig.run(second).state) == ("success", "running")


def test_a_cancelled_run_ends_when_its_last_task_has(rig: SchedulerRig) -> None:
    rig.dag("d", CHAIN)
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    nudges = rig.executor.take()
    rig.claim(nudges)
    with rig.store.begin() as tx:
        runs.cancel(tx, "d", "r0", "ann")
    scheduler.run_once()
    assert rig.run(run).state == "running"
    assert rig.states(run) == {"a": "running", "b": "skipped", "c": "skipped"}
    rig.finish(nudges, TaskState.FAILED)
    scheduler.run_once()
    assert rig.run(run).state == "failed"
    assert rig.run(run).cause == "cancelled by ann"


def test_fail_fast_skips_what_waits_and_leaves_what_runs(rig: SchedulerRig) -> None:
    rig.dag("d", {"a": [], "b": [], "c": ["b"]}, fail_fast=True)
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    nudges = {nudge.task_id: nudge for nudge in rig.executor.take()}
    rig.claim(nudges.values())
    rig.finish([nudges["a"]], TaskState.FAILED)
    scheduler.run_once()
    assert rig.states(run) == {"a": "failed", "b": "running", "c": "skipped"}
    assert rig.run(run).state == "running"
    rig.finish([nudges["b"]])
    scheduler.run_once()
    assert rig.run(run).state == "failed"
    with rig.store.begin() as tx:
        check_invariants(tx)


def test_retries_are_scheduled_when_their_delay_has_passed(rig: SchedulerRig) -> None:
    rig.dag("d", {"a": []})
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    nudges = rig.executor.take()
    rig.claim(nudges)
    rig.finish(nudges, TaskState.UP_FOR_RETRY, delay_seconds=3600, user_failure=True)
    scheduler.run_once()
    assert rig.states(run)["a"] == "up_for_retry"
    rig.execute("UPDATE task_instance SET not_before = now()")

    def is_queued() -> bool:
        scheduler.run_once()
        return rig.states(run)["a"] == "queued"

    eventually(is_queued, 10)
    assert rig.executor.take()[0].attempt_id != nudges[0].attempt_id


# --- publishing


def test_what_could_not_be_published_is_published_later(make_rig: Callable[..., SchedulerRig]) -> None:
    rig = make_rig({"scheduler.republish_after": "0.1", "scheduler.poll_interval": "0.02"})
    rig.worker()
    rig.dag("d", {"a": []})
    rig.trigger("d")
    rig.executor.is_broken = True
    scheduler = rig.scheduler()
    assert scheduler.run_once()["admitted"] == 1
    rig.executor.is_broken = False

    def is_published() -> bool:
        scheduler.run_once()
        return bool(rig.executor.published)

    eventually(is_published, 20)


def test_an_unclaimed_message_is_published_again_only_for_a_free_worker(make_rig: Callable[..., SchedulerRig]) -> None:
    rig = make_rig({"scheduler.republish_after": "0.1", "scheduler.poll_interval": "0.02"})
    rig.worker(concurrency=1)
    rig.dag("d", {"a": [], "b": []})
    rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    rig.claim(rig.executor.take())
    rig.execute("UPDATE worker SET concurrency = 2")  # a second slot, for which the other task is admitted ...
    eventually(lambda: scheduler.run_once()["admitted"], 10)
    lost = rig.executor.take()
    rig.execute("UPDATE worker SET concurrency = 1")  # ... and that is gone again
    rig.execute("UPDATE task_instance SET queued_at = queued_at - interval '1 hour', published_at = NULL")
    for _ in range(5):
        scheduler.wait(scheduler.run_once())
    assert rig.executor.published == []
    rig.execute("UPDATE worker SET concurrency = 2")
    eventually(lambda: scheduler.run_once()["republished"], 10)
    assert rig.executor.take() == lost


def test_published_is_written_down_soon(rig: SchedulerRig) -> None:
    rig.dag("d", {"a": []})
    rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    scheduler.close()
    assert [row.publish_count for row in rig.rows("SELECT publish_count FROM task_instance")] == [1]


# --- creating runs


def due(at: datetime) -> DueRun:
    return DueRun(logical_date=at, interval_start=at, interval_end=at, run_after=at)


def schedule(rig: SchedulerRig, dag_id: str, first: datetime, **options: Any) -> None:
    rig.dag(dag_id, {"a": []}, schedule=ScheduleSpec(kind="cron", expression="0 * * * *"), start_date=first, **options)
    with rig.store.begin() as tx:
        dags.set_next_run(tx, dag_id, due(first))


def test_the_latest_missed_run_is_made_without_catchup(rig: SchedulerRig, doorbell: LocalDoorbell) -> None:
    now = datetime.now(UTC)
    hour = now.replace(minute=0, second=0, microsecond=0)
    schedule(rig, "d", hour - timedelta(hours=30))
    creator = RunCreator(rig.store, doorbell, rig.settings)
    assert creator.run_once() == {"dags": 1, "runs": 1}
    (run,) = rig.rows("SELECT * FROM dag_run")
    assert hour - timedelta(hours=1) <= run.logical_date <= datetime.now(UTC)
    assert (run.run_type, run.state) == ("scheduled", "queued")
    assert rig.rows("SELECT next_run_after FROM dag")[0].next_run_after > now
    assert creator.run_once() == {"dags": 0, "runs": 0}


def test_catchup_makes_the_oldest_first_and_never_more_than_may_run(rig: SchedulerRig, doorbell: LocalDoorbell) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    first = hour - timedelta(hours=500)
    schedule(rig, "d", first, catchup=True, max_active_runs=3)
    creator = RunCreator(rig.store, doorbell, rig.settings)
    assert creator.run_once()["runs"] == 3
    assert creator.run_once() == {"dags": 0, "runs": 0}
    made = rig.rows("SELECT logical_date FROM dag_run ORDER BY logical_date")
    assert [row.logical_date for row in made] == [first + timedelta(hours=n) for n in range(3)]
    rig.execute("UPDATE dag_run SET state = 'success', ended_at = now() WHERE logical_date = :f", f=first)
    assert creator.run_once()["runs"] == 1


def test_one_broken_timetable_stops_its_own_dag_only(
    rig: SchedulerRig, doorbell: LocalDoorbell, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    schedule(rig, "bad", hour)
    schedule(rig, "good", hour)
    real = run_creator_module.runs.create_many

    def create_many(tx: Any, dag_id: str, new: Any) -> Any:
        created = real(tx, dag_id, new)
        if dag_id == "bad":
            raise RuntimeError("no such day")
        return created

    monkeypatch.setattr(run_creator_module.runs, "create_many", create_many)
    creator = RunCreator(rig.store, doorbell, rig.settings)
    assert creator.run_once() == {"dags": 2, "runs": 1}
    assert [row.dag_id for row in rig.rows("SELECT dag_id FROM dag_run")] == ["good"]
    assert creator.run_once() == {"dags": 0, "runs": 0}, "left alone for a while"


def test_an_end_date_ends_it(rig: SchedulerRig, doorbell: LocalDoorbell) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    schedule(rig, "d", hour, end_date=hour)
    assert RunCreator(rig.store, doorbell, rig.settings).run_once()["runs"] == 1
    assert rig.rows("SELECT next_run_after FROM dag")[0].next_run_after is None


# --- rescuing


def rescuer(rig: SchedulerRig, doorbell: LocalDoorbell, infra_retries: int = 1) -> Rescuer:
    return Rescuer(rig.store, doorbell, infra_retries=infra_retries, lease_seconds=0.01, actor="scheduler test")


def lose_worker(rig: SchedulerRig) -> None:
    rig.execute("UPDATE worker SET lease_until = now() - interval '1 second', lease_seconds = 0.01")


def test_an_attempt_whose_lease_ended_runs_again_at_nobodys_cost(rig: SchedulerRig, doorbell: LocalDoorbell) -> None:
    rig.dag("d", {"a": []})
    rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    nudges = rig.executor.take()
    rig.claim(nudges)
    lose_worker(rig)
    assert rescuer(rig, doorbell).run_once() == {"workers": 1, "attempts": 1}
    (ti,) = rig.rows("SELECT * FROM task_instance")
    assert (ti.state, ti.reason, ti.user_failures, ti.infra_failures) == ("up_for_retry", "lease_lost", 0, 1)
    assert "host-7" in ti.cause
    assert rig.finish(nudges) == [], "the worker that was cut off is too late"
    assert rescuer(rig, doorbell).run_once() == {"workers": 0, "attempts": 0}


def test_the_budget_for_losses_is_bounded(rig: SchedulerRig, doorbell: LocalDoorbell) -> None:
    rig.dag("d", {"a": []})
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    rig.claim(rig.executor.take())
    lose_worker(rig)
    rescuer(rig, doorbell, infra_retries=0).run_once()
    scheduler.run_once()
    assert rig.run(run).state == "failed"


def test_a_cancelled_attempt_that_is_lost_has_ended(rig: SchedulerRig, doorbell: LocalDoorbell) -> None:
    rig.dag("d", {"a": []})
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    rig.claim(rig.executor.take())
    with rig.store.begin() as tx:
        runs.cancel(tx, "d", "r0", "ann")
    lose_worker(rig)
    rescuer(rig, doorbell).run_once()
    scheduler.run_once()
    assert rig.run(run).cause == "cancelled by ann"


def test_nobody_is_rescued_right_after_the_database_was_away(
    rig: SchedulerRig, doorbell: LocalDoorbell, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_worker(rig)
    service = Rescuer(rig.store, doorbell, infra_retries=1, lease_seconds=3600, actor="scheduler test")

    def away(*_: Any, **__: Any) -> None:
        raise StoreUnavailableError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(rig.store, "run", away)
        with pytest.raises(StoreUnavailableError):
            service.run_once()
    assert service.run_once() == {"workers": 0, "attempts": 0}
    assert rig.rows("SELECT state FROM worker")[0].state == "live"


# --- the rest


def test_a_run_past_its_timeout_fails_and_says_so(rig: SchedulerRig, doorbell: LocalDoorbell) -> None:
    rig.dag("d", CHAIN, dagrun_timeout_seconds=0.001)
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    nudges = rig.executor.take()
    rig.claim(nudges)
    timeouts = RunTimeouts(rig.store, doorbell, actor="scheduler test")
    eventually(lambda: timeouts.run_once()["runs"], 10)
    assert timeouts.run_once() == {"runs": 0}
    assert rig.rows("SELECT cancel_requested_at FROM task_instance WHERE task_id = 'a'")[0][0] is not None
    rig.finish(nudges, TaskState.FAILED)
    scheduler.run_once()
    assert rig.run(run).state == "failed"
    assert "dagrun_timeout" in rig.run(run).cause


def test_a_stuck_run_is_planned_anew(rig: SchedulerRig, doorbell: LocalDoorbell) -> None:
    rig.dag("d", CHAIN)
    run = rig.trigger("d")
    scheduler = rig.scheduler()
    scheduler.run_once()
    rig.work(rig.executor.take())
    rig.execute("DELETE FROM unaccounted")  # somebody with psql
    rig.execute("UPDATE task_instance SET ended_at = now() - interval '1 hour' WHERE ended_at IS NOT NULL")
    rig.execute("UPDATE dag_run SET started_at = now() - interval '1 hour'")
    scheduler.run_once()
    assert rig.states(run)["b"] == "none"
    assert Sweeper(rig.store, doorbell).run_once()["stuck"] == 1
    scheduler.run_once()
    assert rig.states(run)["b"] == "queued"
    assert Sweeper(rig.store, doorbell).run_once()["stuck"] == 0


def test_the_heartbeat_row_comes_and_goes(rig: SchedulerRig) -> None:
    heartbeat = ServiceHeartbeat(rig.store, "scheduler", every_seconds=0.0)
    heartbeat.beat()
    (first,) = rig.rows("SELECT * FROM service")
    heartbeat.beat()
    (second,) = rig.rows("SELECT * FROM service")
    assert (first.kind, first.id) == ("scheduler", second.id)
    assert second.heartbeat_at > first.heartbeat_at
    rig.execute("DELETE FROM service")
    heartbeat.beat()
    heartbeat.close()
    assert rig.rows("SELECT * FROM service")[0].ended_at is not None


def get(url: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_process_serves_health_and_ends_in_good_order(cluster: Cluster) -> None:
    scheduler = cluster.scheduler()
    row = eventually(lambda: cluster.rows("SELECT * FROM service WHERE kind = 'scheduler'"), 60)[0]
    assert eventually(lambda: get(f"{row.health_url}/readyz")[0] == 200, 30)
    status, body = get(f"{row.health_url}/healthz")
    assert (status, body["component"]) == (200, "scheduler")
    cluster.kill(scheduler, signal.SIGTERM)
    assert scheduler.process.wait(30) == 0, scheduler.log()
    assert cluster.rows("SELECT ended_at FROM service")[0].ended_at is not None
    assert "Traceback" not in scheduler.log()


def test_a_scheduler_waits_for_the_schema_and_for_a_database_that_went(
    make_cluster: Callable[..., Cluster], make_settings: Callable[..., Settings], empty_pg_url: str
) -> None:
    store = Store(empty_pg_url, pool_size=2)
    cluster = make_cluster(settings=make_settings({"database.sql_alchemy_conn": empty_pg_url}))
    scheduler = cluster.scheduler()
    eventually(lambda: "dflow db migrate" in scheduler.log(), 30)
    schema.migrate(store)

    def beats() -> Any:
        with store.begin() as tx:
            return tx.execute(text("SELECT heartbeat_at, health_url FROM service")).first()

    row = eventually(beats, 30)
    for _ in range(2):  # cut every connection, as a failover does
        with store.begin() as tx:
            tx.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :a"),
                       {"a": "dflow scheduler"})  # fmt: skip
    eventually(lambda: (found := beats()) is not None and found.heartbeat_at > row.heartbeat_at, 30)
    assert get(f"{row.health_url}/readyz")[0] == 200
    cluster.kill(scheduler, signal.SIGTERM)
    assert scheduler.process.wait(30) == 0, scheduler.log()
    store.close()


@pytest.mark.parametrize("executor", ["LocalExecutor", "SequentialExecutor"])
def test_a_dag_runs_without_redis_or_celery(make_cluster: Callable[..., Cluster], executor: str) -> None:
    cluster = make_cluster({"core.executor": executor, "core.parallelism": "2", "celery.broker_url": ""})
    cluster.dag_processor()
    scheduler = cluster.scheduler()
    cluster.add_dag(
        "d.py",
        "from dflow import DAG, task\n"
        "with DAG('d', schedule=None):\n"
        "    @task\n"
        "    def one():\n"
        "        return 20\n"
        "    @task\n"
        "    def two(x):\n"
        "        return x + 1\n"
        "    @task\n"
        "    def three(x, y):\n"
        "        return x + y\n"
        "    first = one()\n"
        "    three(two(first), two.override(task_id='other')(first))\n",
    )
    cluster.wait_run(cluster.trigger("d"), 60, state="success")
    (value,) = cluster.rows("SELECT value FROM xcom WHERE task_id = 'three'")
    assert value[0] == 42
    cluster.invariants()
    cluster.kill(scheduler, signal.SIGTERM)
    assert scheduler.process.wait(60) == 0, scheduler.log()
    assert [row.state for row in cluster.rows("SELECT state FROM worker")] == ["gone"]


def test_the_host_of_a_killed_scheduler_goes_too(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster({"core.executor": "LocalExecutor", "core.parallelism": "2", "celery.broker_url": ""})
    scheduler = cluster.scheduler()
    eventually(lambda: cluster.rows("SELECT 1 FROM worker WHERE state = 'live'"), 60)
    cluster.kill(scheduler)
    eventually(lambda: not cluster.marked_processes(), 60)
    assert [row.state for row in cluster.rows("SELECT state FROM worker")] == ["gone"]

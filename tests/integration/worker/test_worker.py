"""The worker as a whole: what a message comes to, with real processes, Redis and Postgres but no scheduler."""

from __future__ import annotations

import os
import pickle
import signal
import uuid
from typing import Any

import psutil
import pytest

from dflow.broker.app import TASK_NAME, make_app
from dflow.core.messages import Nudge
from dflow.core.states import Reason, TaskState
from dflow.store.apply import Change, apply
from tests.integration.worker.rig import WorkerRig
from tests.support import eventually, marked_processes

pytestmark = pytest.mark.integration


def _fields(nudge: Nudge) -> dict[str, Any]:
    return {name: getattr(nudge, name) for name in Nudge.__dataclass_fields__}


def test_a_message_becomes_a_successful_attempt_with_its_result_and_log(rig: WorkerRig) -> None:
    run = rig.dag(
        """
        import logging
        @task
        def t(x):
            print("printed", x)
            logging.getLogger("mine").warning("logged %s", x)
            subprocess.run(["sh", "-c", "echo from a subprocess; echo oops >&2"], check=True)
            sys.stdout.write("no newline")
            return {"n": x + 1}
        t(41)
        """
    )
    nudge = rig.queue(run)
    rig.worker()
    rig.publish(nudge)
    row = rig.wait(nudge)
    assert (row.try_number, row.user_failures, row.infra_failures, row.reason) == (1, 0, 0, "succeeded")
    assert rig.rows("SELECT key, value FROM xcom WHERE run_pk = :r", r=run) == [("return_value", {"n": 42})]
    assert [line for line in rig.lines(nudge) if line[1] != "dflow.task"] == [
        ("INFO", "stdout", "printed 41"),
        ("WARNING", "mine", "logged 41"),
        ("INFO", "stdout", "from a subprocess"),
        ("ERROR", "stderr", "oops"),
        ("INFO", "stdout", "no newline"),
    ]
    attempt = rig.attempt(nudge)
    assert attempt.state == "success"
    assert attempt.peak_rss_bytes > 1024 * 1024


def test_every_way_a_task_can_end_by_itself(rig: WorkerRig) -> None:
    run = rig.dag(
        """
        from dflow import AirflowFailException, AirflowSkipException
        from datetime import timedelta
        @task
        def raises(): raise ValueError("bad zone")
        @task(retries=2, retry_delay=timedelta(seconds=100))
        def retried(): raise ValueError("once more")
        @task
        def skips(): raise AirflowSkipException("nothing to do")
        @task(retries=2)
        def fails(): raise AirflowFailException("hopeless")
        @task
        def leaves(): sys.exit(3)
        @task(execution_timeout=timedelta(seconds=0.3))
        def slow(): time.sleep(60)
        @task(execution_timeout=timedelta(seconds=0.3))
        def deaf_to_its_timeout():
            while True:
                try: time.sleep(60)
                except BaseException: pass
        for one in (raises, retried, skips, fails, leaves, slow, deaf_to_its_timeout): one()
        """
    )
    names = ["raises", "retried", "skips", "fails", "leaves", "slow", "deaf_to_its_timeout"]
    nudges = dict(zip(names, rig.queue_many(run, names), strict=True))
    rig.execute("UPDATE task_instance SET retries = 2 WHERE task_id IN ('retried', 'fails')")
    rig.worker(env={"DFLOW__WORKER__KILL_GRACE": "1"})
    rig.publish(*nudges.values())
    ended = {name: rig.wait(nudge, "success", "failed", "skipped", "up_for_retry") for name, nudge in nudges.items()}
    assert {name: (row.state, row.reason, row.user_failures, row.cause) for name, row in ended.items()} == {
        "raises": ("failed", "raised", 1, "ValueError: bad zone"),
        "retried": ("up_for_retry", "raised", 1, "ValueError: once more"),
        "skips": ("skipped", "skip_raised", 0, "AirflowSkipException: nothing to do"),
        "fails": ("failed", "fail_raised", 1, "AirflowFailException: hopeless"),
        "leaves": ("failed", "exited", 1, "exit code 3"),
        "slow": ("failed", "timeout", 1, ended["slow"].cause),
        "deaf_to_its_timeout": ("failed", "timeout", 1, ended["deaf_to_its_timeout"].cause),
    }
    assert "execution_timeout" in ended["slow"].cause
    assert "did not stop: killed" in ended["deaf_to_its_timeout"].cause
    assert rig.ti(nudges["retried"]).not_before > ended["retried"].ended_at
    assert all(row.infra_failures == 0 for row in ended.values())


def test_a_process_that_dies_ends_its_attempt_with_the_cause_and_the_worker_goes_on(rig: WorkerRig) -> None:
    run = rig.dag(
        """
        @task
        def code(): os._exit(3)
        @task
        def crash(): os.kill(os.getpid(), signal.SIGSEGV)
        @task
        def killed():
            subprocess.Popen(["sleep", "1000"], start_new_session=True)
            os.kill(os.getpid(), signal.SIGKILL)
        @task
        def forked_after():
            pid = os.fork()
            if pid == 0:
                time.sleep(1000)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        @task
        def fine(): return 1
        for one in (code, crash, killed, forked_after, fine): one()
        """
    )
    names = ["code", "crash", "killed", "forked_after"]
    nudges = dict(zip(names, rig.queue_many(run, names), strict=True))
    rig.execute("UPDATE task_instance SET retries = 1 WHERE task_id = 'crash'")
    worker = rig.worker()
    rig.publish(*nudges.values())
    ended = {name: rig.wait(nudge, "failed", "up_for_retry") for name, nudge in nudges.items()}
    facts = {name: (row.state, row.reason, row.user_failures, row.infra_failures) for name, row in ended.items()}
    assert facts == {
        "code": ("failed", "exited", 1, 0),
        "crash": ("up_for_retry", "signalled", 1, 0),
        "killed": ("up_for_retry", "signalled", 0, 1),
        "forked_after": ("up_for_retry", "signalled", 0, 1),
    }
    assert ended["code"].cause.startswith("exited with code 3")
    assert ended["crash"].cause.startswith("killed by signal 11 (SIGSEGV)")
    assert ended["killed"].cause.startswith("killed by signal 9 (SIGKILL)")
    assert {name: rig.attempt(nudge).exit_code for name, nudge in nudges.items()} == {
        "code": 3,
        "crash": -11,
        "killed": -9,
        "forked_after": -9,
    }
    eventually(lambda: not [p for p in marked_processes(rig.token) if p.name() == "sleep"], 10)
    fine = rig.queue(run, "fine")
    rig.publish(fine)
    rig.wait(fine)
    assert worker.poll() is None


def test_messages_that_are_repeated_late_hostile_or_not_ours_change_nothing(rig: WorkerRig) -> None:
    run = rig.dag("@task\ndef t(): time.sleep(0.5)\nt()\n")
    first, late = rig.queue(run), rig.queue(rig.dag("@task\ndef t(): pass\nt()\n"))
    rig.worker("-l", "INFO", concurrency=4)
    superseded = Nudge(**{**_fields(late), "attempt_id": str(uuid.uuid4())})
    rig.publish(first, first, superseded, first, late, first)
    app = make_app(rig.settings)
    hostile = [
        ((), {}),
        ((1,), {}),
        (("1; DROP TABLE worker", first.attempt_id), {}),
        ((first.ti_id, "' OR 1=1"), {}),
        ((-5, first.attempt_id), {}),
        ((first.ti_id, first.attempt_id, "more"), {}),
        ((first.ti_id, first.attempt_id), {"eval": "1"}),
        ((2**80, first.attempt_id), {}),
        ((first.ti_id, None), {}),
    ]
    with app.connection_for_write() as connection:
        for arguments, keywords in hostile:
            app.send_task(TASK_NAME, arguments, keywords, queue="default", connection=connection)
        app.send_task("os.system", ["true"], queue="default", connection=connection)
        producer = connection.Producer(auto_declare=False)
        for content_type, body in [("application/x-python-serialize", pickle.dumps({"a": 1})), ("text/plain", "x")]:
            producer.publish(
                body,
                routing_key="default",
                exchange="default",
                content_type=content_type,
                content_encoding="binary" if isinstance(body, bytes) else "utf-8",
                headers={"task": TASK_NAME, "id": str(uuid.uuid4()), "lang": "py"},
            )
        producer.publish("{not json", routing_key="default", exchange="default", content_type="application/json",
                         content_encoding="utf-8", headers={"task": TASK_NAME, "id": str(uuid.uuid4())})  # fmt: skip
    last = rig.queue(rig.dag("@task\ndef t(): pass\nt()\n"))
    rig.publish(last)
    for nudge in (first, late, last):
        assert rig.wait(nudge).try_number == 1
    starts = rig.rows("SELECT count(*) FROM ti_event WHERE to_state = 'running'")[0][0]
    assert starts == 3
    log = rig.log()
    assert log.count("refused a message") == len(hostile)
    assert "os.system" in log
    assert "Refusing to deserialize" in log or "ContentDisallowed" in log


def test_cancelling_interrupts_a_task_and_kills_one_that_does_not_listen(rig: WorkerRig) -> None:
    run = rig.dag(
        """
        @task(retries=3)
        def polite():
            try:
                time.sleep(600)
            finally:
                print("cleaned up", flush=True)
        @task(retries=3)
        def stubborn():
            subprocess.Popen(["sleep", "1001"], start_new_session=True)
            print("started", flush=True)
            while True:
                try: time.sleep(600)
                except BaseException: pass
        polite(); stubborn()
        """
    )
    polite, stubborn = rig.queue_many(run, ["polite", "stubborn"], retries=3)
    rig.worker(env={"DFLOW__WORKER__LEASE_SECONDS": "4", "DFLOW__WORKER__KILL_GRACE": "0.5"})
    rig.publish(polite, stubborn)
    eventually(lambda: any(text == "started" for _, _, text in rig.lines(stubborn)), 20)
    rig.wait(polite, "running")
    rig.execute(
        "UPDATE task_instance SET cancel_requested_at = now(), cancelled_by = 'ann (cli)' WHERE run_pk = :r", r=run
    )
    for nudge in (polite, stubborn):
        row = rig.wait(nudge, "failed")
        assert (row.reason, row.cause, row.user_failures, row.infra_failures) == (
            "cancelled",
            "cancelled by ann (cli)",
            0,
            0,
        )
    assert "cleaned up" in [text for _, _, text in rig.lines(polite)]
    eventually(lambda: not [p for p in marked_processes(rig.token) if p.name() == "sleep"], 10)


def test_an_attempt_ended_from_outside_is_killed_and_nothing_is_written(rig: WorkerRig) -> None:
    run = rig.dag("@task\ndef t():\n    print('up', flush=True)\n    time.sleep(600)\nt()\n")
    nudge = rig.queue(run)
    rig.worker(env={"DFLOW__WORKER__LEASE_SECONDS": "4", "DFLOW__WORKER__KILL_GRACE": "0.5"})
    rig.publish(nudge)
    eventually(lambda: rig.lines(nudge), 20)
    pid = rig.ti(nudge).pid
    with rig.store.begin() as tx:
        change = Change(
            ti_id=nudge.ti_id, from_state=TaskState.RUNNING, to_state=TaskState.SUCCESS, reason=Reason.MARKED,
            attempt_id=nudge.attempt_id, actor="test",
        )  # fmt: skip
        assert apply(tx, [change])
    eventually(lambda: not psutil.pid_exists(pid), 10)
    assert rig.ti(nudge).state == "success"
    assert rig.rows("SELECT count(*) FROM attempt")[0][0] == 1


def test_a_killed_parent_hands_its_attempts_back_at_once(rig: WorkerRig) -> None:
    run = rig.dag(
        """
        @task
        def t():
            subprocess.Popen(["sleep", "1002"], start_new_session=True)
            print("up", flush=True)
            time.sleep(600)
        t()
        """
    )
    nudges = rig.queue_many(run, ["t"], copies=2)
    worker = rig.worker(env={"DFLOW__WORKER__LEASE_SECONDS": "60"})
    rig.publish(*nudges)
    eventually(lambda: all(rig.lines(nudge) for nudge in nudges), 20)
    worker.kill()
    worker.wait(10)
    for nudge in nudges:
        row = rig.wait(nudge, "up_for_retry", deadline_seconds=10)
        facts = (row.reason, row.user_failures, row.infra_failures)
        assert facts == ("worker_lost", 0, 1), f"{row.cause}\n{rig.log()}"
    eventually(lambda: not marked_processes(rig.token), 10)
    (row,) = rig.rows("SELECT state, cause FROM worker")
    assert tuple(row) == ("gone", "the worker's process died")


def test_a_killed_agent_takes_the_worker_and_its_tasks_with_it(rig: WorkerRig) -> None:
    run = rig.dag("@task\ndef t():\n    print('up', flush=True)\n    time.sleep(600)\nt()\n")
    nudge = rig.queue(run)
    worker = rig.worker()
    rig.publish(nudge)
    eventually(lambda: rig.lines(nudge), 20)
    rig.agent(worker).kill()
    assert rig.wait_exit(worker, 10) != 0
    eventually(lambda: not marked_processes(rig.token), 10)
    assert rig.ti(nudge).state == "running"  # the lease brings it back


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_draining_lets_short_tasks_finish_and_hands_the_rest_back(rig: WorkerRig, how: signal.Signals) -> None:
    run = rig.dag(
        """
        @task(retries=1)
        def short():
            print("up", flush=True)
            time.sleep(2)
        @task(retries=1)
        def long():
            print("up", flush=True)
            time.sleep(600)
        @task
        def waiting(): pass
        short(); long(); waiting()
        """
    )
    short, long, waiting = rig.queue_many(run, ["short", "long", "waiting"], retries=1)
    worker = rig.worker(concurrency=2, env={"DFLOW__WORKER__DRAIN_GRACE": "4"})
    rig.publish(short, long)
    eventually(lambda: rig.lines(short) and rig.lines(long), 20)
    os.killpg(worker.pid, how)  # as a terminal or a supervisor sends it: to the whole group
    rig.publish(waiting)
    assert rig.wait(short).user_failures == 0
    row = rig.wait(long, "up_for_retry")
    assert (row.reason, row.user_failures, row.infra_failures) == ("worker_drained", 0, 0)
    assert row.not_before <= row.ended_at
    assert rig.wait_exit(worker, 20) == (0 if how == signal.SIGTERM else 1)  # Celery's own exit codes
    assert rig.ti(waiting).state in ("queued", "scheduled")
    (gone,) = rig.rows("SELECT state, cause FROM worker")
    assert tuple(gone) == ("gone", "shut down")


def test_a_second_signal_ends_a_drain_at_once(rig: WorkerRig) -> None:
    run = rig.dag("@task\ndef t():\n    print('up', flush=True)\n    time.sleep(600)\nt()\n")
    nudge = rig.queue(run)
    worker = rig.worker(env={"DFLOW__WORKER__DRAIN_GRACE": "300"})
    rig.publish(nudge)
    eventually(lambda: rig.lines(nudge), 20)
    worker.send_signal(signal.SIGTERM)
    eventually(lambda: rig.rows("SELECT 1 FROM worker WHERE state = 'draining'"), 10)
    worker.send_signal(signal.SIGTERM)
    rig.wait_exit(worker, 20)
    assert rig.ti(nudge).reason == "worker_drained"


def test_a_cold_shutdown_hands_everything_back(rig: WorkerRig) -> None:
    run = rig.dag("@task\ndef t():\n    print('up', flush=True)\n    time.sleep(600)\nt()\n")
    nudge = rig.queue(run)
    worker = rig.worker(env={"DFLOW__WORKER__DRAIN_GRACE": "300"})
    rig.publish(nudge)
    eventually(lambda: rig.lines(nudge), 20)
    worker.send_signal(signal.SIGQUIT)
    rig.wait_exit(worker, 25)
    row = rig.ti(nudge)
    assert (row.state, row.reason, row.infra_failures) == ("up_for_retry", "worker_drained", 0)


def test_a_worker_that_lost_its_consumer_exits_and_says_so(rig: WorkerRig) -> None:
    run = rig.dag("@task\ndef t(): pass\nt()\n")
    worker = rig.worker(
        env={"DFLOW__WORKER__LEASE_SECONDS": "4", "DFLOW__WORKER__KILL_GRACE": "0.5", "DFLOW__WORKER__DEAF_AFTER": "2"}
    )
    nudge = rig.queue(run)  # "published", as far as the rows know, but no message ever reaches this worker
    rig.execute("UPDATE task_instance SET published_at = now(), publish_count = 1")
    assert rig.wait_exit(worker, 20) == 74
    (row,) = rig.rows("SELECT state, cause FROM worker")
    assert tuple(row) == ("gone", "consumer lost")
    assert rig.ti(nudge).state == "queued"


def test_processes_are_replaced_and_added_under_way_without_losing_anything(rig: WorkerRig) -> None:
    run = rig.dag("@task\ndef t(): return os.getpid()\nt()\n")
    nudges = rig.queue_many(run, ["t"], copies=40)
    worker = rig.worker("--autoscale", "4,1", env={"DFLOW__WORKER__MAX_TASKS_PER_CHILD": "5"})
    assert rig.rows("SELECT concurrency FROM worker")[0][0] == 4
    rig.publish(*nudges)
    for nudge in nudges:
        row = rig.wait(nudge, deadline_seconds=60)
        assert (row.try_number, row.infra_failures) == (1, 0)
    per_process = rig.rows("SELECT value, count(*) FROM xcom WHERE key = 'return_value' GROUP BY value")
    assert all(count <= 5 for _, count in per_process)
    assert len(per_process) >= 8
    assert worker.poll() is None

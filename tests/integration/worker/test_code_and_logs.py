"""Where a worker's code comes from and where what it says goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.worker.rig import HEADER, WorkerRig
from tests.support import eventually

pytestmark = pytest.mark.integration


def test_each_run_keeps_the_code_it_started_with(rig: WorkerRig, tmp_path: Path) -> None:
    dag = (
        HEADER
        + "from helper import value\nwith DAG('d', schedule=None):\n    @task\n    def t(): return value()\n    t()\n"
    )
    runs = [
        rig.run({"dags/d.py": dag, "dags/helper.py": f"def value(): return {number}\n"}, path="dags/d.py")
        for number in (1, 2)
    ]
    rig.worker(concurrency=1)
    for indexes in ((0,), (1,)):  # cold, then warm, in one process
        nudges = [nudge for run in runs for nudge in rig.queue_many(run, ["t"], indexes=indexes)]
        rig.publish(*nudges)
        for nudge in nudges:
            rig.wait(nudge)
    values = rig.rows("SELECT run_pk, value FROM xcom WHERE key = 'return_value' ORDER BY run_pk, map_index")
    assert [(row.run_pk, row.value) for row in values] == [(runs[0], 1), (runs[0], 1), (runs[1], 2), (runs[1], 2)]
    assert len(list(rig.settings.worker.bundle_cache_dir.iterdir())) == 2


def test_code_that_cannot_be_loaded_is_the_users_failure_with_the_traceback_in_the_log(rig: WorkerRig) -> None:
    broken = rig.queue(rig.run({"d.py": "import no_such_module_anywhere\n"}), retries=1)
    other_dag = rig.queue(rig.run({"d.py": HEADER + "DAG('another')\n"}))
    no_task = rig.queue(rig.dag("@task\ndef t(): pass\nt()\n"), "gone")
    no_bundle = rig.queue(rig.dag("@task\ndef t(): return 'another bundle'\nt()\n"))
    rig.execute("UPDATE dag_run SET bundle_hash = 'abc123' WHERE id = (SELECT max(id) FROM dag_run)")
    endless = rig.queue(rig.run({"d.py": "while True: pass\n"}))
    rig.worker(env={"DFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "1"})
    nudges = (broken, other_dag, no_task, no_bundle, endless)
    rig.publish(*nudges)
    rows = [rig.wait(nudge, "failed", "up_for_retry") for nudge in nudges]
    assert [(row.state, row.reason, row.user_failures) for row in rows] == [
        ("up_for_retry", "load_failed", 1),
        ("failed", "load_failed", 1),
        ("failed", "load_failed", 1),
        ("failed", "load_failed", 1),
        ("failed", "load_failed", 1),
    ]
    for row, word in zip(rows, ["no_such_module", "'d'", "gone", "abc123", "dagbag_import_timeout"], strict=True):
        assert word in row.cause
    assert any("no_such_module_anywhere" in text for _, _, text in rig.lines(broken))


def test_logs_stream_while_the_task_runs_and_survive_everything_a_task_can_write(
    rig: WorkerRig, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    run = rig.dag(
        f"""
        import logging
        @task
        def t():
            print("early")
            while not os.path.exists({str(go)!r}): time.sleep(0.05)
            os.write(1, b"nul \\x00 and \\xff\\xfe\\n")
            logging.getLogger("s").info("surrogate \\udc80 %s", "a")
            logging.getLogger("s").info("bad %d", "format")
            print("x" * 40000)
            for number in range(20000): print(number)
            raise ValueError("bad \\x00 \\udc80 cause")
        t()
        """
    )
    nudge = rig.queue(run)
    rig.worker()
    rig.publish(nudge)
    eventually(lambda: ("INFO", "stdout", "early") in rig.lines(nudge), 20)
    assert rig.ti(nudge).state == "running"
    go.touch()
    row = rig.wait(nudge, "failed")
    assert row.cause == "ValueError: bad \ufffd ? cause"
    texts = [text for _, source, text in rig.lines(nudge) if source in ("stdout", "s")]
    assert "nul \ufffd and \ufffd\ufffd" in texts
    assert "surrogate ? a" in texts
    assert any("could not be formatted" in text for text in texts)
    assert sum(len(text) for text in texts if set(text) == {"x"}) == 40000
    numbers = [int(text) for text in texts if text.isdigit()]
    assert numbers == list(range(20000))
    assert not rig.rows("SELECT 1 FROM log_chunk WHERE pg_column_size(lines) > 2000000")


def test_tasks_speak_to_each_other_through_the_agent(rig: WorkerRig) -> None:
    run = rig.dag(
        """
        @task
        def a(ti=None):
            ti.xcom_push("k", {"n": [1, 2]})
            return 7
        @task
        def b(x, ti=None):
            return [x, ti.xcom_pull(task_ids="a", key="k")]
        b(a())
        """
    )
    first, second = rig.queue_many(run, ["a", "b"])
    rig.worker(concurrency=1)
    rig.publish(first)
    rig.wait(first)
    rig.publish(second)
    rig.wait(second)
    (row,) = rig.rows("SELECT value FROM xcom WHERE task_id = 'b'")
    assert row.value == [7, {"n": [1, 2]}], json.dumps(row.value)

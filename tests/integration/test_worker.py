"""The worker as a whole: what a message comes to, with real processes, Redis and Postgres but no scheduler."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dflow.settings import Settings
from dflow.store.engine import Store
from tests.integration.worker_rig import WorkerRig

pytestmark = pytest.mark.integration


@pytest.fixture
def make_rig(
    make_settings: Callable[..., Settings], store: Store, tmp_path: Path
) -> Iterator[Callable[..., WorkerRig]]:
    rigs: list[WorkerRig] = []

    def make(values: dict[str, str] | None = None, **options: str) -> WorkerRig:
        rigs.append(WorkerRig(make_settings(values, **options), store, tmp_path))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.stop()
    for folder in tmp_path.rglob("bundle-cache"):
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def rig(make_rig: Callable[..., WorkerRig]) -> WorkerRig:
    return make_rig()


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

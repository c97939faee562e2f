"""A task that takes more memory than there is. Needs a memory cgroup of its own, so a machine where we may make one."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.worker.rig import WorkerRig
from tests.support import eventually, marked_processes

pytestmark = pytest.mark.integration

_LIMIT_BYTES = 500 * 1024 * 1024
_INSIDE = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.executable, sys.argv[2:])"


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup with little memory."""
    v1 = Path("/sys/fs/cgroup/memory")
    root, limit = (v1, "memory.limit_in_bytes") if v1.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    group = root / f"dflow-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        try:
            (group / limit).write_text(str(_LIMIT_BYTES))
        except OSError as error:
            pytest.skip(f"no limit can be set here: {error}")
        yield group
        eventually(lambda: not (group / "cgroup.procs").read_text().split(), 10)
    finally:
        group.rmdir()


def test_a_task_killed_for_memory_says_so_and_how_much_it_had(rig: WorkerRig, cgroup: Path) -> None:
    run = rig.dag(
        """
        @task
        def t():
            print("up", flush=True)
            kept = []
            while True:
                kept.append(bytearray(b"x") * (4 * 1024 * 1024))
                time.sleep(0.02)
        @task
        def fine(): pass
        t(); fine()
        """
    )
    nudge, fine = rig.queue_many(run, ["t", "fine"])
    with (rig.directory / "worker.log").open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", _INSIDE, str(cgroup / "cgroup.procs"), sys.executable, "-m", "celery"]
            + ["-A", "worker", "worker", "-c", "1"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=rig.environ(),
            start_new_session=True,
            cwd=rig.directory,
        )
    rig.workers.append(worker)
    rig.publish(nudge)
    row = rig.wait(nudge, "failed", deadline_seconds=60)
    assert (row.reason, row.user_failures, row.infra_failures) == ("out_of_memory", 1, 0)
    assert row.cause.startswith("killed by the kernel: out of memory, peak ")
    assert rig.attempt(nudge).peak_rss_bytes > 100 * 1024 * 1024
    rig.publish(fine)
    rig.wait(fine)
    worker.terminate()
    rig.wait_exit(worker, 20)
    eventually(lambda: not marked_processes(rig.token), 10)
    assert os.path.exists(cgroup)

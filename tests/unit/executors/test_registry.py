from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dflow import settings as settings_module
from dflow.core.errors import PublishError
from dflow.core.messages import Nudge
from dflow.executors.registry import NAMES, executor_for
from dflow.settings.schema import EXECUTORS

NUDGE = Nudge(
    ti_id=1, attempt_id="a", dag_id="d", task_id="t", run_id="r", map_index=-1, queue="default", priority_weight=1
)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_gives_its_executor(tmp_path: Path, name: str) -> None:
    env = {"DFLOW__CORE__EXECUTOR": name, "DFLOW__CELERY__BROKER_URL": "redis://127.0.0.1:1/0"}
    assert executor_for(settings_module.load(home=tmp_path, env=env)).name == name


def test_the_setting_offers_what_there_is() -> None:
    assert set(EXECUTORS) == set(NAMES)


def test_a_local_executor_without_its_host_says_so(tmp_path: Path) -> None:
    executor = executor_for(settings_module.load(home=tmp_path, env={"DFLOW__CORE__EXECUTOR": "LocalExecutor"}))
    with pytest.raises(PublishError):
        executor.publish([NUDGE])
    executor.stop()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("dflow.services.scheduler", ["dflow.runtime.loader", "dflow.runtime.runner", "dflow.runtime.child"]),
        ("dflow.executors.local", ["dflow.runtime.loader", "dflow.runtime.runner", "celery", "dflow.store"]),
        ("dflow.services.base", ["celery", "redis", "sqlalchemy"]),
    ],
)
def test_importing_stays_within_bounds(module: str, forbidden: list[str]) -> None:
    """The scheduler never imports what runs user code; a local executor needs no Celery."""
    code = f"import {module}, sys; print([name for name in {forbidden!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"

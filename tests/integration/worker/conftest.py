"""A worker rig for each test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dflow.settings import Settings
from dflow.store.engine import Store
from tests.integration.worker.rig import WorkerRig


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

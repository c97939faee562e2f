"""Makes attempts for the tests of the runtime: work, a client over dicts, settings."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dflow import DAG
from dflow.runtime.protocol import LogLine, Outcome, Work
from dflow.runtime.runner import run_attempt
from dflow.settings import Settings, load

WHEN = datetime(2026, 3, 29, 1, 30, 15, 42, tzinfo=UTC)


class Client:
    """An `AttemptClient` that remembers what it was asked."""

    def __init__(self, **xcoms: Any) -> None:
        self.xcoms: dict[tuple[str, str], Any] = {(name, "return_value"): value for name, value in xcoms.items()}
        self.pushed: dict[str, Any] = {}
        self.pulls: list[dict[str, Any]] = []

    def push_xcom(self, key: str, value: Any) -> None:
        self.pushed[key] = value

    def pull_xcoms(
        self,
        *,
        task_ids: Sequence[str] | None,
        key: str,
        map_indexes: Sequence[int] | None = None,
        dag_id: str | None = None,
        run_id: str | None = None,
        include_prior_dates: bool = False,
    ) -> list[tuple[str, int, Any]]:
        self.pulls.append({"task_ids": task_ids, "key": key, "map_indexes": map_indexes, "dag_id": dag_id,
                           "run_id": run_id, "include_prior_dates": include_prior_dates})  # fmt: skip
        return [(t, -1, v) for (t, k), v in sorted(self.xcoms.items()) if k == key and t in (task_ids or ())]

    def task_states(self, task_ids: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(task_ids, "success")

    def log(self, lines: Sequence[LogLine]) -> None: ...


def settings(tmp: Path | str = "/nonexistent", **env: str) -> Settings:
    """Return settings of an environment of their own; ``env`` are DFLOW__SECTION__KEY names without the prefix."""
    return load(env={"DFLOW_HOME": str(tmp), **{f"DFLOW__{name}": value for name, value in env.items()}})


def work(dag: DAG, task_id: str, **changes: Any) -> Work:
    """Return the work of a first attempt of a task."""
    values: dict[str, Any] = {
        "ti_id": 1, "attempt_id": str(uuid.uuid4()), "run_pk": 7, "dag_id": dag.dag_id, "run_id": "run",
        "task_id": task_id,
        "map_index": -1, "try_number": 1, "user_failures": 0, "retries": 0, "run_type": "manual", "logical_date": WHEN,
        "data_interval_start": WHEN, "data_interval_end": WHEN, "run_after": WHEN, "run_started_at": WHEN, "conf": {},
        "bundle_hash": "b", "path": "dag.py", "queue": "default", "pool": "default_pool", "priority_weight": 1,
        "hostname": "here", "started_at": WHEN, **changes,
    }  # fmt: skip
    return Work(**values)


def attempt(
    dag: DAG, task_id: str, client: Client | None = None, *, config: Mapping[str, str] | None = None, **changes: Any
) -> Outcome:
    """Run one attempt of a task."""
    return run_attempt(work(dag, task_id, **changes), dag, client or Client(), settings=settings(**(config or {})))

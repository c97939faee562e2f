"""Schedulers without workers: the real passes over a real database; the test plays the workers, row by row."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text

from dflow.broker.doorbell import LocalDoorbell
from dflow.core.errors import PublishError
from dflow.core.messages import Nudge
from dflow.core.spec import DagSpec, TaskSpec
from dflow.core.states import Reason, RunType, TaskState
from dflow.services.affinity import Share
from dflow.services.scheduler import Scheduler
from dflow.settings import Settings
from dflow.store import dags, runs, workers
from dflow.store.apply import Applied, Change, apply
from dflow.store.engine import Store


class FakeExecutor:
    """Keeps what was published; fails on request."""

    name = "FakeExecutor"

    def __init__(self) -> None:
        self.published: list[Nudge] = []
        self.is_broken = False

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def publish(self, nudges: Sequence[Nudge]) -> None:
        if self.is_broken:
            raise PublishError("no broker")
        self.published.extend(nudges)

    def take(self) -> list[Nudge]:
        taken, self.published = self.published, []
        return taken


class SchedulerRig:
    """One database, any number of schedulers over it, one pretended worker."""

    def __init__(self, settings: Settings, store: Store, directory: Path) -> None:
        self.settings, self.store, self.directory = settings, store, directory
        self.executor = FakeExecutor()
        self.worker_id = str(uuid.uuid4())
        self._doorbells: list[LocalDoorbell] = []

    def scheduler(self, executor: FakeExecutor | None = None, *, share: Share | None = None) -> Scheduler:
        return Scheduler(self.store, executor or self.executor, self.doorbell(), self.settings, share=share)

    def doorbell(self) -> LocalDoorbell:
        self._doorbells.append(LocalDoorbell(self.directory / "bell"))
        return self._doorbells[-1]

    def close(self) -> None:
        for doorbell in self._doorbells:
            doorbell.close()

    def worker(self, *, concurrency: int = 1000, lease_seconds: float = 3600.0) -> str:
        """Register the pretended worker."""
        with self.store.begin() as tx:
            workers.register(
                tx,
                worker_id=self.worker_id,
                name="w@test",
                hostname="host-7",
                pid=1,
                executor=FakeExecutor.name,
                queues=["default"],
                concurrency=concurrency,
                lease_seconds=lease_seconds,
                version="test",
            )
        return self.worker_id

    def dag(self, dag_id: str, tasks: dict[str, Sequence[str]], **options: Any) -> DagSpec:
        """Store a DAG: ``{"a": [], "b": ["a"]}`` says who waits for whom."""
        task_options = options.pop("task_options", {})
        spec = DagSpec(
            dag_id=dag_id,
            tasks=tuple(
                TaskSpec(task_id=task_id, operator="Test", upstream=tuple(sorted(upstream)), **task_options)
                for task_id, upstream in sorted(tasks.items())
            ),
            **{"max_active_tasks": 1000, **options},
        )
        with self.store.begin() as tx:
            dags.upsert(
                tx, spec, bundle_name="b", path=f"{dag_id}.py", bundle_hash=f"hash of {dag_id}", paused_default=False
            )
        return spec

    def trigger(self, dag_id: str, number: int = 0) -> int:
        now = datetime.now(UTC)
        with self.store.begin() as tx:
            run = runs.create(
                tx,
                dag_id=dag_id,
                run_id=f"r{number}",
                run_type=RunType.MANUAL,
                logical_date=None,
                data_interval_start=None,
                data_interval_end=None,
                run_after=now,
                conf={},
                triggered_by="test",
            )
        return run.id

    # The pretended worker

    def claim(self, nudges: Iterable[Nudge]) -> list[Applied]:
        return self._apply(nudges, TaskState.QUEUED, TaskState.RUNNING, Reason.CLAIMED, worker_id=self.worker_id,
                           hostname="host-7")  # fmt: skip

    def finish(self, nudges: Iterable[Nudge], state: TaskState = TaskState.SUCCESS, **fields: Any) -> list[Applied]:
        reason = Reason.SUCCEEDED if state is TaskState.SUCCESS else Reason.RAISED
        return self._apply(nudges, TaskState.RUNNING, state, reason, **fields)

    def work(self, nudges: Iterable[Nudge], state: TaskState = TaskState.SUCCESS) -> list[Applied]:
        """Claim and finish; what is not to be had is left out, as a worker would."""
        nudges = list(nudges)
        claimed = {applied.ti_id for applied in self.claim(nudges)}
        return self.finish([nudge for nudge in nudges if nudge.ti_id in claimed], state)

    def _apply(
        self, nudges: Iterable[Nudge], before: TaskState, after: TaskState, reason: Reason, **fields: Any
    ) -> list[Applied]:
        with self.store.begin() as tx:
            return apply(
                tx,
                [
                    Change(
                        ti_id=nudge.ti_id,
                        from_state=before,
                        to_state=after,
                        reason=reason,
                        attempt_id=nudge.attempt_id,
                        actor="worker w@test",
                        **fields,
                    )
                    for nudge in {nudge.ti_id: nudge for nudge in nudges}.values()
                ],
            )

    # Looking

    def rows(self, query: str, **values: Any) -> Sequence[Any]:
        with self.store.begin() as tx:
            return tx.execute(text(query), values).all()

    def execute(self, query: str, **values: Any) -> None:
        with self.store.begin() as tx:
            tx.execute(text(query), values)

    def states(self, run_pk: int) -> dict[str, str]:
        found = self.rows("SELECT task_id, state FROM task_instance WHERE run_pk = :r", r=run_pk)
        return {row.task_id: row.state for row in found}

    def run(self, run_pk: int) -> Any:
        return self.rows("SELECT * FROM dag_run WHERE id = :r", r=run_pk)[0]

"""What a DAG or task has when its author says nothing: settings, reduced to what authoring needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dflow.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The values of settings that stand in for unset arguments; durations in seconds."""

    retries: int = 0
    retry_delay_seconds: float = 300.0
    execution_timeout_seconds: float | None = None
    owner: str = "airflow"
    queue: str = "default"
    max_active_runs: int = 16
    max_active_tasks: int = 16
    catchup: bool = False
    timezone: str = "UTC"

    @classmethod
    def from_settings(cls, settings: Settings) -> Defaults:
        """Take the defaults from the resolved settings."""
        core = settings.core
        return cls(
            retries=core.default_task_retries,
            retry_delay_seconds=core.default_task_retry_delay,
            execution_timeout_seconds=core.default_task_execution_timeout,
            owner=settings.operators.default_owner,
            queue=settings.operators.default_queue,
            max_active_runs=core.max_active_runs_per_dag,
            max_active_tasks=core.max_active_tasks_per_dag,
            catchup=settings.scheduler.catchup_by_default,
            timezone=core.default_timezone,
        )

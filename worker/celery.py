"""The application ``celery -A worker`` finds: dflow's Celery options, the one task, and the steps around the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import Celery

from dflow import settings as settings_module
from dflow.broker.app import TASK_NAME, make_app
from dflow.settings import Settings

if TYPE_CHECKING:
    from dflow.runtime.child import ChildLoop

_loop: ChildLoop | None = None


def make_worker_app(settings: Settings) -> Celery:
    """Return the application of a worker with these settings. Raises SettingsError without a usable broker URL."""
    from worker.bootsteps import AgentStep

    app = make_app(settings)
    app.conf.update(
        worker_pool="worker.prefork:TaskPool",
        worker_lost_wait=2.0,  # Celery's own note of a lost child; the agent has acted on it long before
        worker_max_memory_per_child=settings.worker.max_memory_per_child_mb * 1024 or None,  # Celery counts KiB
    )
    app.dflow_settings = settings
    app.steps["worker"].add(AgentStep)

    def run(*arguments: Any, **keywords: Any) -> None:
        run_nudge(settings, arguments, keywords)

    app.task(
        name=TASK_NAME, Request="worker.request:Request", ignore_result=True, acks_late=True, typing=False, shared=False
    )(run)
    return app


def run_nudge(settings: Settings, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """In a task process: run one attempt. The first call makes the process's `ChildLoop`."""
    global _loop
    if _loop is None:
        from dflow.runtime.child import ChildLoop

        _loop = ChildLoop(settings)
    if len(arguments) != 2 or keywords:
        arguments = (None, repr((arguments, keywords)))  # refused and logged like any other that is no nudge
    _loop.run_one(*arguments)


app = make_worker_app(settings_module.load())

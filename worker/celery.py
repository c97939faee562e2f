"""The application ``celery -A worker`` finds: dflow's Celery options, the one task, and the steps around the pool."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final

from celery import Celery

from dflow import settings as settings_module
from dflow.broker.app import TASK_NAME, make_app
from dflow.settings import Settings
from dflow.standalone.attach import attach

if TYPE_CHECKING:
    from dflow.runtime.child import ChildLoop

log = logging.getLogger(__name__)

_EXIT_UNFIT: Final = 70  # EX_SOFTWARE
# Celery's two lines for each message, "received" and "succeeded", say less than the rows and cost a tenth of the time.
_CHATTER: Final = ("celery.worker.strategy", "celery.app.trace")
_loop: ChildLoop | None = None


def make_worker_app(settings: Settings) -> Celery:
    """Return the application of a worker with these settings. Raises SettingsError without a usable broker URL."""
    from worker.bootsteps import AgentStep

    app = make_app(settings)
    app.conf.update(
        worker_pool="worker.prefork:TaskPool",
        worker_consumer="worker.consumer:Consumer",
        worker_lost_wait=2.0,  # Celery's own note of a lost child; the agent has acted on it long before
        worker_max_memory_per_child=settings.worker.max_memory_per_child_mb * 1024 or None,  # Celery counts KiB
    )
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
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
        _loop = _make_loop(settings)
    if len(arguments) != 2 or keywords:
        arguments = (None, repr((arguments, keywords)))  # refused and logged like any other that is no nudge
    _loop.run_one(*arguments)


def _make_loop(settings: Settings) -> ChildLoop:
    """A process that cannot set itself up would swallow every message it gets. It ends, and Celery replaces it."""
    from dflow.runtime.child import ChildLoop

    try:
        return ChildLoop(settings)
    except Exception:
        log.exception("this task process cannot work; ending it")
        logging.shutdown()
        os._exit(_EXIT_UNFIT)


app = make_worker_app(attach(settings_module.load(), source="the `dflow standalone` of this home"))

"""Is anybody there to run it? Says what would keep a run waiting: a paused DAG, no scheduler, no worker for a queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dflow.settings import Settings
    from dflow.store.engine import Tx

_ANY_QUEUE = "*"


def problems_of(tx: Tx, settings: Settings, dag_id: str) -> list[str]:
    """Return why new runs of a DAG would wait, each with what to do. Raises NotFoundError for an unknown DAG."""
    from dflow.store import dags

    problems = []
    if dags.get(tx, dag_id).is_paused:
        problems.append(f"The DAG {dag_id} is paused: its runs wait until `dflow dags unpause {dag_id}`.")
    problems += _scheduler_problems(tx, settings)
    problems += _worker_problems(tx, settings, {task.queue for task in dags.current(tx, dag_id).spec.tasks})
    return problems


def _scheduler_problems(tx: Tx, settings: Settings) -> Iterator[str]:
    from dflow.store import services

    threshold = settings.scheduler.health_check_threshold
    if services.list_live(tx, "scheduler", within_seconds=threshold):
        return
    last = next((service for service in services.list_(tx) if service.kind == "scheduler"), None)
    if last is None:
        yield "No scheduler has ever run; start one with `dflow scheduler` (or everything with `dflow standalone`)."
    elif last.ended_at is not None:
        yield "No scheduler is running: the last one was stopped. Start one with `dflow scheduler`."
    else:
        yield (
            f"No scheduler is alive: the last one, on {last.hostname} (pid {last.pid}), has finished no pass for more "
            f"than {threshold:g} s. Its log says why; start another with `dflow scheduler`."
        )


def _worker_problems(tx: Tx, settings: Settings, queues: set[str]) -> Iterator[str]:
    from dflow.store import workers

    executor = settings.core.executor
    served = {queue for one in workers.list_live(tx, executor) for queue in one.worker.queues}
    start = "start one with `dflow worker`" if executor == "CeleryExecutor" else "a scheduler with it brings its own"
    if not served:
        yield f"No worker of the {executor} is alive; {start}."
        return
    for queue in sorted(queues - served) if _ANY_QUEUE not in served else ():
        yield f"No worker consumes the queue {queue!r}; start one with `dflow worker -q {queue}`."

"""Celery's prefork pool, which tells the agent at once how each task process ended and how many there are.

Celery itself waits seconds before it calls a task lost with its process, in case a result is still on its way; the
agent needs the exit status (it alone writes the end) and needs it now.
"""

from __future__ import annotations

from typing import Any, Final

from celery.concurrency import prefork
from celery.concurrency.asynpool import AsynPool

from worker import link

_LOOK_SECONDS: Final = 0.02
_LOOKS: Final = 50


class ReportingPool(AsynPool):  # type: ignore[misc]  # Celery has no types
    """The pool of processes."""

    def _event_process_exit(self, hub: Any, proc: Any) -> None:
        """Called when a process has closed its descriptors, which is a moment before its status can be collected.

        Celery looks once and then again only with its timer, seconds later.
        """
        super()._event_process_exit(hub, proc)
        self._look_again(hub, proc, _LOOKS)

    def _look_again(self, hub: Any, proc: Any, looks: int) -> None:
        if proc.exitcode is None and looks:
            self.maintain_pool()
            hub.call_later(_LOOK_SECONDS, self._look_again, hub, proc, looks - 1)

    def process_flush_queues(self, worker: Any) -> None:
        """Called by billiard first of all for a process whose exit status it has collected."""
        agent = link.agent()
        if agent is not None and worker.exitcode is not None:
            agent.report_child_exit(worker.pid, worker.exitcode)
        super().process_flush_queues(worker)

    def on_grow(self, n: int) -> None:
        """Called by `control pool_grow` and the autoscaler."""
        super().on_grow(n)
        self._report_size()

    def on_shrink(self, n: int) -> None:
        """Called by `control pool_shrink` and the autoscaler, once for each process."""
        super().on_shrink(n)
        self._report_size()

    def _report_size(self) -> None:
        agent = link.agent()
        if agent is not None:
            agent.resize(self._processes)


class TaskPool(prefork.TaskPool):  # type: ignore[misc]
    """What ``worker_pool`` names."""

    Pool = ReportingPool

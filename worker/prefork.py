"""Celery's prefork pool, which tells the agent at once how each task process ended and how many there are.

Celery itself waits seconds before it calls a task lost with its process, in case a result is still on its way; the
agent needs the exit status (it alone writes the end) and needs it now.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Final

from billiard.pool import DEATH
from celery.concurrency import asynpool, prefork
from celery.concurrency.asynpool import AsynPool

from worker import link

_EXIT_FAILURE: Final = 1
_LOOK_SECONDS: Final = 0.02
_LOOKS: Final = 50


class QuickWorker(asynpool.Worker):  # type: ignore[misc]  # Celery has no types
    """A pool process that leaves at once when its time has come.

    Billiard's own waits a second, so that its last message may be read; but a pipe keeps what was written into it, and
    with short tasks and `worker.max_tasks_per_child` that second would be a good part of a process's life.
    """

    def _do_exit(self, pid: int, exitcode: int | None, exc: BaseException | None = None) -> None:
        code = exitcode if exitcode is not None else (_EXIT_FAILURE if exc is not None else 0)
        if self.on_exit is not None:
            self.on_exit(pid, code)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # an end in the middle of the message would leave a torn one
        try:
            self.outq.put((DEATH, (pid, code)))
        finally:
            os._exit(code)


class ReportingPool(AsynPool):  # type: ignore[misc]  # Celery has no types
    """The pool of processes."""

    Worker = QuickWorker

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

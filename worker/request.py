"""Celery's view of one message in a worker, with the ending of task processes left to the agent."""

from __future__ import annotations

from typing import Any

from celery.worker.request import Request as CeleryRequest

from worker import link


class Request(CeleryRequest):  # type: ignore[misc]  # Celery has no types
    """A request whose cancellation is the agent's to do."""

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown gives all tasks up (`Consumer.cancel_active_requests`).

        Celery would send SIGTERM to the process and publish a retry. The agent instead ends it with everything it
        started and hands the attempt back with the right reason.
        """
        agent = link.agent()
        if agent is None:
            super().cancel(pool, signal=signal, emit_retry=False)
        else:
            agent.drain(0.0)

"""Around Celery's pool: the agent is there before the first task process and goes after the last one."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

import psutil
from celery import bootsteps, signals
from celery.exceptions import ImproperlyConfigured, WorkerShutdown
from celery.worker import state
from celery.worker.components import Hub, Pool

from dflow.core.errors import AgentStartError
from dflow.runtime.agent import AgentEnd, AgentProcess
from dflow.runtime.protocol import SOCKET_VARIABLE
from dflow.services.health import Health, HealthServer
from dflow.settings import Settings
from worker import link
from worker.prefork import TaskPool

log = logging.getLogger(__name__)

EXECUTOR: Final = "CeleryExecutor"
_TICK_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 5.0  # a loop that has not turned for so long does not consume
_OVERTIME_SECONDS: Final = 15.0  # what a shutdown may take beyond the grace, before it is forced
_EXIT_FORCED: Final = 1


class AgentStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Starts the agent before the pool and stops it after the pool.

    A worker without its agent is of no use: when the agent goes unasked, so do the task processes and this process.
    """

    requires = (Hub,)

    def __init__(self, parent: Any, **options: Any) -> None:
        self._agent: AgentProcess | None = None
        self._health: Health | None = None
        self._server: HealthServer | None = None
        self._shutdowns = 0
        self._ticked_at = -_PAUSE_SECONDS
        if TaskPool not in getattr(parent.pool_cls, "__mro__", ()):
            raise ImproperlyConfigured("dflow runs tasks in processes of their own: leave out -P, or say -P prefork")
        # Workers of dflow share nothing by messages; asking around at the start would only cost a second.
        parent.options |= {"without_mingle": True, "without_gossip": True}
        super().__init__(parent, **options)

    def start(self, parent: Any) -> None:
        """Start the health endpoint and the agent; waits for the database."""
        import dflow.runtime.child  # noqa: F401 task processes are forked with everything they need imported

        settings: Settings = parent.app.dflow_settings
        self._settings = settings
        self._health = Health("worker", threshold_seconds=max(30.0, settings.worker.lease_seconds))
        self._server = HealthServer(self._health, port=settings.worker.health_check_port).start()
        self._health.info["url"] = self._server.url
        try:
            self._agent = AgentProcess.start(
                settings,
                name=parent.hostname,
                executor=EXECUTOR,
                queues=sorted(parent.app.amqp.queues.consume_from),
                concurrency=parent.max_concurrency or parent.concurrency,
                health_url=self._server.url,
                on_exit=_on_agent_end,
                on_status=self._on_status,
                should_give_up=_is_shutting_down,
            )
        except AgentStartError:
            if _is_shutting_down():
                raise WorkerShutdown(0) from None
            raise
        link.set_agent(self._agent)
        os.environ[SOCKET_VARIABLE] = self._agent.socket_path
        os.register_at_fork(after_in_child=lambda: link.set_agent(None))
        signals.worker_process_init.connect(_own_session)
        signals.worker_shutting_down.connect(self._on_shutdown)

    def register_with_event_loop(self, parent: Any, hub: Any) -> None:
        """Let the loop that consumes show that it turns."""
        hub.call_repeatedly(_TICK_SECONDS, self._tick)

    def close(self, parent: Any) -> None:
        """Shutting down, however it was asked for (`control shutdown` sends no signal): claim nothing more."""
        if self._agent is not None:
            self._agent.drain(self._settings.worker.drain_grace)

    def stop(self, parent: Any) -> None:
        """The pool has ended."""
        if self._agent is not None:
            self._agent.stop()
            link.set_agent(None)
        if self._server is not None:
            self._server.stop()

    def terminate(self, parent: Any) -> None:
        """A cold shutdown: whatever runs is handed back."""
        self.stop(parent)

    def _on_shutdown(self, how: str = "Warm", **_kwargs: Any) -> None:
        """In a signal handler. The first warm signal gives tasks the grace; any further one does not."""
        self._shutdowns += 1
        agent = self._agent
        if agent is None:
            return
        grace = self._settings.worker.drain_grace if how == "Warm" and self._shutdowns == 1 else 0.0
        agent.drain(grace)
        if self._shutdowns == 1:
            timer = threading.Timer(self._settings.worker.drain_grace + _OVERTIME_SECONDS, _force_exit)
            timer.daemon = True
            timer.start()

    def _tick(self) -> None:
        """In the loop that consumes. While the broker is away it does not turn."""
        now = time.monotonic()
        if now - self._ticked_at > _PAUSE_SECONDS and self._agent is not None:
            self._agent.consuming()
        self._ticked_at = now

    def _on_status(self, status: Mapping[str, Any]) -> None:
        """In the agent's thread: what the agent says is what our health is made of."""
        health = self._health
        if health is None:
            return
        health.info |= {name: status[name] for name in ("draining", "running", "claimed")}
        if not status["database"]:
            health.failed("the database is away")
        elif status["draining"]:
            health.failed("draining")
        elif time.monotonic() - self._ticked_at > _PAUSE_SECONDS:
            health.failed("not consuming yet, or the broker is away")
        else:
            health.passed()


Pool.requires = (*Pool.requires, AgentStep)  # Celery starts steps in the order of what they require


def _is_shutting_down() -> bool:
    # Celery keeps an exit code here once it shuts down, and that may be 0.
    return any(flag is not None and flag is not False for flag in (state.should_stop, state.should_terminate))


def _own_session(**_kwargs: Any) -> None:
    """In a new task process: a Ctrl-C in the terminal is for the parent, which drains."""
    try:
        os.setsid()
    except OSError:
        pass


def _on_agent_end(end: AgentEnd) -> None:
    """In the agent's thread. Nobody renews the lease any more: end every task now, then this process."""
    if end.is_expected:
        return
    log.critical("the agent of this worker is gone (%s); ending the worker", end.cause)
    _kill_children()
    logging.shutdown()
    os._exit(end.exit_code if end.exit_code > 0 else _EXIT_FORCED)


def _force_exit() -> None:
    log.critical("the shutdown did not end in time; ending the worker now")
    _kill_children()
    logging.shutdown()
    os._exit(_EXIT_FORCED)


def _kill_children() -> None:
    agent = link.agent()
    keep = agent.pid if agent is not None else None  # it still has to hand attempts back
    for process in psutil.Process().children(recursive=True):
        if process.pid != keep:
            try:
                process.kill()
            except psutil.Error:
                continue

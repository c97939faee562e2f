"""The agent process: one loop, one Postgres connection, for all task processes of a worker machine.

Each turn collects what the task processes have sent, does all of it in one transaction, and answers. While one commit
runs the next requests pile up, so the batches are as large as the load needs (group commit without a timer). What it
promises beyond that:

- The lease is renewed four times in its length. When it cannot be, the watchdog thread ends the tasks in time.
- Requests that meet a database that is away wait and are tried again; a request the database refuses fails alone.
- A task process that dies, overruns its time limit, or is cancelled gets its end written with a cause.
- Without its parent it ends the tasks, hands the attempts back and goes.

The loop holds the parts together: `switchboard` (the sockets), `desk` (requests and their transaction), `wards` (the
running attempts), `lease`, and the parent at the other end of ``control``.
"""

from __future__ import annotations

import logging
import os
import random
import selectors
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from dflow import __version__
from dflow import settings as settings_module
from dflow.broker.doorbell import doorbell_for
from dflow.broker.ping import ping
from dflow.core.errors import BrokerUnavailableError, ConflictError, SchemaError, StoreUnavailableError
from dflow.runtime.agent import EXIT_DEAF, EXIT_FAILED, EXIT_FENCED, EXIT_STOPPED, AgentConfig, config_from_json
from dflow.runtime.bundles import Shelf
from dflow.runtime.commit import Identity, is_outage
from dflow.runtime.desk import Desk
from dflow.runtime.ends import EndKind
from dflow.runtime.lease import Lease, Watchdog, boot_seconds
from dflow.runtime.live import Connection
from dflow.runtime.protocol import FrameDecoder, encode_frame, read_frame
from dflow.runtime.ringer import Ringer
from dflow.runtime.switchboard import Switchboard
from dflow.runtime.wards import Wards
from dflow.settings import Settings
from dflow.store import deaf, schema, workers
from dflow.store.engine import Store
from dflow.telemetry import logging as telemetry_logging

log = logging.getLogger(__name__)

_READ_BYTES: Final = 64 * 1024
_START_SECONDS: Final = 120.0
_PING_SECONDS: Final = 1.0
_PARENT_CHECK_SECONDS: Final = 1.0
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 2.0
_CELERY: Final = "CeleryExecutor"
_HAS_PIDFD: Final = hasattr(os, "pidfd_open")


def run_agent(control: socket.socket) -> int:
    """Be the agent of the parent at the other end of ``control``; return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent gets them too, and drains
    message = read_frame(control)
    if message is None:
        return EXIT_STOPPED
    config = config_from_json(message["config"])
    settings = settings_module.load()
    telemetry_logging.configure(settings, "agent")
    agent = Agent(settings, config, control)
    try:
        return agent.run()
    except (SchemaError, ConflictError) as error:
        agent.leave(str(error), EXIT_FAILED)
        return EXIT_FAILED
    except Exception as error:
        log.exception("the agent failed")
        agent.leave(f"the agent failed: {type(error).__name__}: {error}", EXIT_FAILED)
        return EXIT_FAILED
    finally:
        agent.close()


class Agent:
    """The loop, its lease and its parent. Only `Wards.fence` runs in another thread (the watchdog's)."""

    def __init__(self, settings: Settings, config: AgentConfig, control: socket.socket) -> None:
        self._settings = settings
        self._config = config
        self._control = control
        self._control_decoder = FrameDecoder()
        self._store = Store.from_settings(settings, f"agent {config.name}", pool_size=1)
        self._identity = self._new_identity()
        self._concurrency = config.concurrency
        self._lease = Lease(settings.worker.lease_seconds)
        self._ringer = Ringer(doorbell_for(settings))
        self._selector = selectors.DefaultSelector()
        self._shelf = Shelf(settings)
        self._wards = Wards(kill_grace=settings.worker.kill_grace, ask_how_ended=self._ask_how_ended)
        self._desk = Desk(settings, store=self._store, wards=self._wards, shelf=self._shelf, on_end=self._ringer.ring)
        self._switchboard = Switchboard(
            self._selector, config.socket_path, on_request=self._desk.take, on_gone=self._on_gone
        )
        self._desk.switchboard = self._switchboard
        if config.executor == _CELERY:  # a worker that still starts its processes cannot be deaf
            self._desk.last_claim_at += _START_SECONDS
        self._next_parent_check_at = 0.0
        self._retry_at = 0.0  # the database is not asked before
        self._pause = _FIRST_PAUSE_SECONDS
        self._has_database = True
        self._drain_at: float | None = None  # when draining: running attempts are ended then
        self._is_drain_known = False  # in the database
        self._is_stopping = False
        self._has_parent = True
        self._cause = "shut down"
        self._exit_code = EXIT_STOPPED

    # Life

    def run(self) -> int:
        """Serve until nothing is left to do."""
        if not self._register_patiently():
            return EXIT_STOPPED
        watchdog = Watchdog(
            self._lease, has_work=lambda: bool(self._wards.live), fence=self._wards.fence, exit_code=EXIT_FENCED
        )
        self._watch(self._control, self._on_control)
        self._watch(self._shelf, lambda _events: self._shelf.deliver())
        self._watch_parent()
        self._tell({"op": "ready", "worker_id": self._identity.worker_id})
        self._tell_status()
        while not self._is_done():
            for key, events in self._selector.select(self._seconds_to_next()):
                key.data(events)
            self._look_for_parent()
            self._desk.pending += self._wards.look_after(self._drain_at)
            self._work()
        watchdog.stop()
        self._deregister()
        self.leave(self._cause, self._exit_code)
        return self._exit_code

    def leave(self, cause: str, code: int) -> None:
        """Tell the parent that this is the end, and why."""
        self._tell({"op": "exit", "cause": cause, "code": code})

    def close(self) -> None:
        """Let go of everything outside of this process."""
        self._shelf.close()
        self._switchboard.close()
        self._store.close()

    def _is_done(self) -> bool:
        return self._is_stopping and not self._wards.live and not self._desk.pending

    def _watch(self, fileobj: Any, callback: Callable[[int], None]) -> None:
        self._selector.register(fileobj, selectors.EVENT_READ, callback)

    def _seconds_to_next(self) -> float:
        """How long the loop may wait for events."""
        now = time.monotonic()
        at = [now + max(self._lease.due_at - boot_seconds(), 0.0), *self._wards.instants(self._drain_at)]
        if self._desk.pending:
            at.append(now)
        if not _HAS_PIDFD:
            at.append(self._next_parent_check_at)
        return max(max(min(at), self._retry_at) - now, 0.0)

    def _on_gone(self, connection: Connection) -> None:
        live = connection.live
        if live is not None and live.attempt_id in self._wards.live:
            self._wards.lost(live)
        else:
            self._switchboard.release(connection.process)

    # The database

    def _work(self) -> None:
        """Renew when it is time, and do what is pending."""
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._lease.is_due():
                self._renew()
            self._desk.commit(self._identity)
        except Exception as error:
            if not is_outage(error):
                raise
            self._database_is_away(error)
        else:
            self._database_is_back()

    def _database_is_away(self, error: Exception) -> None:
        if self._has_database:
            self._has_database = False
            log.warning("the database is away, waiting: %s", error)
            self._tell_status()
        self._retry_at = time.monotonic() + self._pause * random.uniform(0.5, 1.0)  # noqa: S311 jitter
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        if not self._has_parent and self._lease.is_over():
            log.warning("giving up handing %d attempts back; they are rescued by their lease", len(self._wards.live))
            self._wards.live.clear()
            self._desk.pending.clear()

    def _database_is_back(self) -> None:
        if not self._has_database:
            self._has_database = True
            log.info("the database is back")
            self._tell_status()
        self._pause = _FIRST_PAUSE_SECONDS
        self._retry_at = 0.0

    # The lease

    def _new_identity(self) -> Identity:
        return Identity(
            worker_id=str(uuid.uuid4()),
            actor=f"worker {self._config.name}",
            hostname=socket.gethostname(),
            infra_retries=self._settings.core.infra_retries,
            max_retry_delay=self._settings.core.max_task_retry_delay,
        )

    def _register_patiently(self) -> bool:
        """Register, waiting for a database that is away; False when the parent went or gave up meanwhile."""
        was_told = False
        self._control.settimeout(_FIRST_PAUSE_SECONDS)
        while True:
            try:
                schema.check(self._store)
                self._register()
            except StoreUnavailableError as error:
                if not was_told:
                    was_told = True
                    log.warning("waiting for the database: %s", error)
            else:
                self._control.setblocking(False)
                return True
            try:
                message = read_frame(self._control)
            except TimeoutError:
                continue
            except (OSError, ValueError):
                return False
            if message is None or message["op"] in ("stop", "drain"):
                return False
            self._control.settimeout(_LONGEST_PAUSE_SECONDS)

    def _register(self) -> None:
        sent_at = boot_seconds()
        self._store.run(
            lambda tx: workers.register(
                tx,
                worker_id=self._identity.worker_id,
                name=self._config.name,
                hostname=self._identity.hostname,
                pid=self._config.parent_pid,
                executor=self._config.executor,
                queues=self._config.queues,
                concurrency=self._concurrency,
                lease_seconds=self._lease.seconds,
                version=__version__,
                health_url=self._config.health_url,
            )
        )
        self._lease.renewed(sent_at)
        log.info("worker %s has the lease %s", self._config.name, self._identity.worker_id)

    def _renew(self) -> None:
        """Renew the lease, and learn what the database thinks we run."""
        sent_at = boot_seconds()
        renewal, is_deaf = self._store.run(partial(self._renew_in, may_be_deaf=self._may_be_deaf()))
        if not renewal.ok:
            self._start_anew()
            return
        self._is_drain_known = self._is_draining
        self._lease.renewed(sent_at)
        self._compare(renewal.attempts)
        if is_deaf and self._has_broker():
            log.critical("this worker has free slots and takes no work although there is some: its consumer is lost")
            self._cause, self._exit_code = "consumer lost", EXIT_DEAF
            self._is_stopping = True
            self._drain(self._settings.worker.drain_grace)
        self._tell_status()

    def _renew_in(self, tx: Any, *, may_be_deaf: bool) -> tuple[workers.Renewal, bool]:
        if self._is_draining and not self._is_drain_known:
            workers.drain(tx, self._identity.worker_id)
        stats = workers.WorkerStats(claimed=self._desk.claimed, concurrency=self._concurrency)
        renewal = workers.renew(tx, self._identity.worker_id, self._lease.seconds, stats)
        return renewal, may_be_deaf and deaf.has_waiting(
            tx,
            executor=self._config.executor,
            queues=self._config.queues,
            after_seconds=self._settings.worker.deaf_after,
        )

    def _may_be_deaf(self) -> bool:
        """There are free slots, and for a while nobody has asked for work."""
        is_idle = len(self._wards.live) < self._concurrency and not self._desk.claiming
        idle_seconds = time.monotonic() - self._desk.last_claim_at
        return is_idle and not self._is_draining and idle_seconds > self._settings.worker.deaf_after

    def _has_broker(self) -> bool:
        """A worker that cannot reach its broker is not deaf. It is given its time anew when the broker is back."""
        if self._config.executor != _CELERY:
            return True
        try:
            ping(self._settings, timeout_seconds=_PING_SECONDS)
        except BrokerUnavailableError as error:
            log.warning("taking no work, for the broker is away: %s", error)
            self._desk.last_claim_at = time.monotonic()
            return False
        return True

    def _start_anew(self) -> None:
        """Somebody declared us gone: what we ran is others' now. Only a new incarnation may claim again."""
        log.error("the lease %s was declared gone; ending its tasks and registering anew", self._identity.worker_id)
        for live in list(self._wards.live.values()):
            self._wards.kill(live, EndKind.NOT_OURS)
            self._wards.forget(live)
        self._desk.drop_attempts()
        self._identity = self._new_identity()
        self._register()

    def _compare(self, attempts: list[workers.RunningAttempt]) -> None:
        held = {one.attempt_id: one for one in attempts}
        for attempt_id, live in list(self._wards.live.items()):
            row = held.pop(attempt_id, None)
            if live.is_ending:
                continue
            if row is None:
                log.warning("attempt %s of %s was ended from outside; killing its process", attempt_id, live.name)
                self._wards.kill(live, EndKind.NOT_OURS)
            elif row.cancel_requested and live.cancelled_by is None:
                self._wards.cancel(live, row.cancelled_by)
        for attempt_id, row in held.items():
            if attempt_id not in self._desk.claiming:
                self._desk.hand_back_unknown(row)

    def _deregister(self) -> None:
        try:
            self._store.run(lambda tx: workers.deregister(tx, self._identity.worker_id, self._cause))
        except StoreUnavailableError as error:
            log.warning("could not say goodbye to the database (%s); the lease runs out by itself", error)
        self._ringer.finish()

    # The parent

    def _watch_parent(self) -> None:
        """Beside the end of its socket, for a child of the parent may still hold the other end."""
        try:
            descriptor = os.pidfd_open(self._config.parent_pid)
        except (OSError, AttributeError):
            return  # the check of the parent's pid finds it
        self._watch(descriptor, partial(self._on_parent_gone, descriptor))

    def _on_parent_gone(self, descriptor: int, _events: int) -> None:
        self._selector.unregister(descriptor)
        self._lost_parent()

    def _look_for_parent(self) -> None:
        now = time.monotonic()
        if now >= self._next_parent_check_at:
            self._next_parent_check_at = now + _PARENT_CHECK_SECONDS
            if os.getppid() != self._config.parent_pid:
                self._lost_parent()

    def _on_control(self, _events: int) -> None:
        try:
            data = self._control.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(self._control)
            self._lost_parent()
            return
        for message in self._control_decoder.feed(data):
            self._on_order(message)

    def _on_order(self, message: Mapping[str, Any]) -> None:
        match message["op"]:
            case "drain":
                self._drain(message["grace"])
            case "stop":
                self._is_stopping = True
                self._switchboard.read_all()
                self._drain(0.0)
            case "consuming":
                self._desk.last_claim_at = time.monotonic()
            case "resize":
                self._concurrency = message["concurrency"]
                self._lease.due_at = 0.0
            case "child_exit":
                self._wards.note_exit(message["pid"], message["exit_code"])

    def _lost_parent(self) -> None:
        """Nobody collects our task processes any more: end them, hand their attempts back, go."""
        if not self._has_parent:
            return
        self._has_parent = False
        self._is_stopping = True
        self._drain(0.0)
        if self._wards.live:
            log.error("the worker's process is gone; ending %d tasks and handing them back", len(self._wards.live))
        if self._exit_code == EXIT_STOPPED and not self._is_drain_known:
            self._cause = "the worker's process died"
        self._switchboard.read_all()  # an end that was reported is an end
        self._wards.kill_all(EndKind.WORKER_LOST)

    def _drain(self, grace_seconds: float) -> None:
        at = time.monotonic() + grace_seconds
        if self._drain_at is None:
            log.info("draining: %d running, %g s for them to finish", len(self._wards.live), grace_seconds)
            self._lease.due_at = 0.0  # tell the database now
        self._drain_at = at if self._drain_at is None else min(at, self._drain_at)
        self._desk.is_draining = True

    @property
    def _is_draining(self) -> bool:
        return self._drain_at is not None

    def _ask_how_ended(self, pid: int) -> None:
        if self._has_parent:
            self._tell({"op": "how_ended", "pid": pid})

    def _tell(self, message: Mapping[str, Any]) -> None:
        try:
            self._control.settimeout(1.0)
            self._control.sendall(encode_frame(message))
        except OSError:
            pass  # a parent that is gone or stuck is noticed elsewhere
        finally:
            self._control.setblocking(False)

    def _tell_status(self) -> None:
        self._tell(
            {
                "op": "status",
                "database": self._has_database,
                "draining": self._is_draining,
                "running": len(self._wards.live),
                "claimed": self._desk.claimed,
            }
        )

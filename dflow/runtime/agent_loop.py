"""The agent process: one loop, one Postgres connection, for all task processes of a worker machine.

Each turn collects what the task processes have sent, does all of it in one transaction, and answers. While one commit
runs the next requests pile up, so the batches are as large as the load needs (group commit without a timer). What it
promises beyond that:

- The lease is renewed four times in its length. When it cannot be, the watchdog thread ends the tasks in time.
- Requests that meet a database that is away wait and are tried again; a request the database refuses fails alone.
- A task process that dies, overruns its time limit, or is cancelled gets its end written with a cause.
- Without its parent it ends the tasks, hands the attempts back and goes.
"""

from __future__ import annotations

import logging
import os
import random
import selectors
import signal
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from dflow import __version__
from dflow import settings as settings_module
from dflow.broker.doorbell import Doorbell, doorbell_for
from dflow.broker.ping import ping
from dflow.core.errors import BrokerUnavailableError, ConflictError, DflowError, SchemaError, StoreUnavailableError
from dflow.core.states import Reason, TaskState
from dflow.runtime.agent import EXIT_DEAF, EXIT_FAILED, EXIT_FENCED, EXIT_STOPPED, AgentConfig, config_from_json
from dflow.runtime.bundles import BundleFetcher
from dflow.runtime.commit import Answer, Identity, commit
from dflow.runtime.ends import EndKind, RetrySettings
from dflow.runtime.lease import Lease, Watchdog, boot_seconds
from dflow.runtime.live import Connection, Live, Request
from dflow.runtime.processes import ChildProcess, OomCounter
from dflow.runtime.protocol import ATTEMPT_VARIABLE, FrameDecoder, encode_frame, read_frame, work_to_json
from dflow.settings import Settings
from dflow.store import deaf, schema, workers
from dflow.store.engine import Store
from dflow.telemetry import logging as telemetry_logging

log = logging.getLogger(__name__)

_READ_BYTES: Final = 256 * 1024
_BACKLOG_BYTES: Final = 4 * 1024 * 1024  # of one process; it is not read from beyond that
_CLOSING_SECONDS: Final = 0.2  # between a process closing its descriptors and its end
_SAMPLE_SECONDS: Final = 1.0
_STATUS_WAIT_SECONDS: Final = 3.0  # how long a parent may take to say how its child ended
_EXIT_KEPT_SECONDS: Final = 10.0
_START_SECONDS: Final = 120.0
_PING_SECONDS: Final = 1.0
_CELERY: Final = "CeleryExecutor"
_PARENT_CHECK_SECONDS: Final = 1.0
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 2.0
_OUTAGE_CLASSES: Final = frozenset({"08", "25", "40", "53", "55", "57", "58", "XX"})  # Postgres manual, appendix A
_PEER: Final = struct.Struct("3i")


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
    """The state of the loop. Only `_fence` runs in another thread (the watchdog's)."""

    def __init__(self, settings: Settings, config: AgentConfig, control: socket.socket) -> None:
        self._settings = settings
        self._config = config
        self._control = control
        self._control_decoder = FrameDecoder()
        self._store = Store.from_settings(settings, f"agent {config.name}", pool_size=1)
        self._hostname = socket.gethostname()
        self._identity = self._new_identity()
        self._concurrency = config.concurrency
        self._lease = Lease(settings.worker.lease_seconds)
        self._live: dict[str, Live] = {}  # by attempt id
        self._claiming: set[str] = set()  # attempt ids of claims on their way to the database
        self._pending: list[Request] = []
        self._connections: dict[int, Connection] = {}  # by descriptor of the socket
        self._exits: dict[int, Exit] = {}  # by pid: how children ended, as the parent saw
        self._bundles_wanted: dict[str, list[Connection]] = {}
        self._bundle_folders: dict[str, str] = {}
        self._fetched: list[tuple[str, str | None, str | None]] = []
        self._fetcher = BundleFetcher(settings, self._on_fetched)
        self._oom = OomCounter()
        self._ringer = Ringer(doorbell_for(settings))
        self._selector = selectors.DefaultSelector()
        self._listener = _listen(config.socket_path)
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        self._claimed = 0
        # When a worker counts as having taken work last. One that still starts its processes cannot be deaf.
        self._last_claim_at = time.monotonic() + (_START_SECONDS if config.executor == _CELERY else 0.0)
        self._next_sample_at = 0.0
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

    # --- life

    def run(self) -> int:
        """Serve until nothing is left to do."""
        if not self._register_patiently():
            return EXIT_STOPPED
        watchdog = Watchdog(self._lease, has_work=lambda: bool(self._live), fence=self._fence, exit_code=EXIT_FENCED)
        self._watch(self._listener, self._accept)
        self._watch(self._control, self._on_control)
        self._watch(self._wake_reader, self._on_wake)
        self._watch_parent()
        self._tell({"op": "ready", "worker_id": self._identity.worker_id})
        self._tell_status()
        while not self._is_done():
            for key, events in self._selector.select(self._seconds_to_next()):
                key.data(events)
            self._look_after()
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
        self._fetcher.stop()
        Path(self._config.socket_path).unlink(missing_ok=True)
        try:
            Path(self._config.socket_path).parent.rmdir()
        except OSError:
            pass
        self._store.close()

    def _is_done(self) -> bool:
        if not self._is_stopping:
            return False
        return not self._live and not self._pending

    def _new_identity(self) -> Identity:
        return Identity(
            worker_id=str(uuid.uuid4()),
            actor=f"worker {self._config.name}",
            hostname=self._hostname,
            infra_retries=self._settings.core.infra_retries,
            max_retry_delay=self._settings.core.max_task_retry_delay,
        )

    # --- the lease

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
                hostname=self._hostname,
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
        stats = workers.WorkerStats(claimed=self._claimed, concurrency=self._concurrency)
        is_idle = not self._is_draining and len(self._live) < self._concurrency and not self._claiming
        idle_seconds = time.monotonic() - self._last_claim_at
        after = self._settings.worker.deaf_after

        def renew(tx: Any) -> tuple[workers.Renewal, bool]:
            if self._is_draining and not self._is_drain_known:
                workers.drain(tx, self._identity.worker_id)
            renewal = workers.renew(tx, self._identity.worker_id, self._lease.seconds, stats)
            is_deaf = (
                is_idle
                and idle_seconds > after
                and deaf.has_waiting(
                    tx, executor=self._config.executor, queues=self._config.queues, after_seconds=after
                )
            )
            return renewal, is_deaf

        renewal, is_deaf = self._store.run(renew)
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

    def _has_broker(self) -> bool:
        """A worker that cannot reach its broker is not deaf. It is given its time anew when the broker is back."""
        if self._config.executor != _CELERY:
            return True
        try:
            ping(self._settings, timeout_seconds=_PING_SECONDS)
        except BrokerUnavailableError as error:
            log.warning("taking no work, for the broker is away: %s", _short(error))
            self._last_claim_at = time.monotonic()
            return False
        return True

    def _start_anew(self) -> None:
        """Somebody declared us gone: what we ran is others' now. Only a new incarnation may claim again."""
        log.error("the lease %s was declared gone; ending its tasks and registering anew", self._identity.worker_id)
        for live in list(self._live.values()):
            self._kill(live, EndKind.NOT_OURS)
            self._forget(live)
        self._pending = [one for one in self._pending if one.live is None]
        self._identity = self._new_identity()
        self._register()

    def _compare(self, attempts: list[workers.RunningAttempt]) -> None:
        held = {one.attempt_id: one for one in attempts}
        for attempt_id, live in list(self._live.items()):
            row = held.pop(attempt_id, None)
            if live.is_ending:
                continue
            if row is None:
                log.warning("attempt %s of %s was ended from outside; killing its process", attempt_id, live.name)
                self._kill(live, EndKind.NOT_OURS)
            elif row.cancel_requested and live.cancelled_by is None:
                self._cancel(live, row.cancelled_by)
        for attempt_id in held:
            if attempt_id not in self._claiming:
                self._hand_back_unknown(held[attempt_id])

    def _hand_back_unknown(self, row: workers.RunningAttempt) -> None:
        """The database says we run it and we do not: a claim whose commit we never heard of, its process gone."""
        log.warning("attempt %s is ours in the database and not here; handing it back", row.attempt_id)
        process = ChildProcess(os.getpid())
        live = Live(
            ti_id=row.ti_id, attempt_id=row.attempt_id, run_pk=0, name="", seed=str(row.ti_id), bundle_hash="",
            user_failures=0, retry=self._default_retry(0), process=process, claimed_at=time.monotonic(),
            kind=EndKind.WORKER_LOST, is_ending=True, is_killed=True, died_at=time.monotonic(),
        )  # fmt: skip
        self._pending.append(Request(op="died", message={}, live=live))

    def _fence(self) -> None:
        """In the watchdog's thread: end every task at once, for the lease is over."""
        for live in list(self._live.values()):
            live.process.kill_tree(f"{ATTEMPT_VARIABLE}={live.attempt_id}")
        for live in list(self._live.values()):
            live.process.wait_gone(1.0)

    def _deregister(self) -> None:
        try:
            self._store.run(lambda tx: workers.deregister(tx, self._identity.worker_id, self._cause))
        except StoreUnavailableError as error:
            log.warning("could not say goodbye to the database (%s); the lease runs out by itself", error)
        self._ringer.ring()
        self._ringer.finish()

    # --- the parent

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
                self._read_everything()
                self._drain(0.0)
            case "consuming":
                self._last_claim_at = time.monotonic()
            case "resize":
                self._concurrency = message["concurrency"]
                self._lease.due_at = 0.0
            case "child_exit":
                self._note_exit(message["pid"], message["exit_code"])

    def _note_exit(self, pid: int, exit_code: int | None) -> None:
        """Keep it for a moment only: a pid names another process soon enough."""
        now = time.monotonic()
        self._exits = {one: exit for one, exit in self._exits.items() if exit.at > now - _EXIT_KEPT_SECONDS}
        self._exits[pid] = Exit(exit_code, now)

    def _lost_parent(self) -> None:
        """Nobody collects our task processes any more: end them, hand their attempts back, go."""
        if not self._has_parent:
            return
        self._has_parent = False
        self._is_stopping = True
        self._drain(0.0)
        if self._live:
            log.error("the worker's process is gone; ending %d tasks and handing them back", len(self._live))
        if self._exit_code == EXIT_STOPPED and not self._is_drain_known:
            self._cause = "the worker's process died"
        self._read_everything()
        for live in list(self._live.values()):
            if not live.is_ending:
                self._kill(live, EndKind.WORKER_LOST)

    def _read_everything(self) -> None:
        """Take what task processes managed to say: an end they reported is an end."""
        for connection in list(self._connections.values()):
            self._read(connection)

    def _drain(self, grace_seconds: float) -> None:
        at = time.monotonic() + grace_seconds
        if self._drain_at is None:
            log.info("draining: %d running, %g s for them to finish", len(self._live), grace_seconds)
            self._lease.due_at = 0.0  # tell the database now
        self._drain_at = at if self._drain_at is None else min(at, self._drain_at)

    @property
    def _is_draining(self) -> bool:
        return self._drain_at is not None

    def _tell(self, message: Mapping[str, Any]) -> None:
        try:
            self._control.setblocking(True)
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
                "running": len(self._live),
                "claimed": self._claimed,
            }
        )

    # --- connections of task processes

    def _watch(self, fileobj: Any, callback: Callable[[int], None]) -> None:
        self._selector.register(fileobj, selectors.EVENT_READ, callback)

    def _accept(self, _events: int) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            pid = _peer_pid(sock)
            if pid is None:
                sock.close()
                continue
            sock.setblocking(False)
            self._exits.pop(pid, None)
            connection = Connection(sock, ChildProcess(pid))
            self._connections[sock.fileno()] = connection
            connection.events = selectors.EVENT_READ
            self._selector.register(sock, selectors.EVENT_READ, partial(self._on_child, connection))
            exit_fd = connection.process.exit_fd
            if exit_fd is not None:
                # A process the task forked may hold the socket open after the death of ours.
                self._watch(exit_fd, partial(self._on_process_end, connection))

    def _on_child(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush(connection)
        if events & selectors.EVENT_READ:
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            while connection.is_open and connection.backlog <= _BACKLOG_BYTES:
                data = connection.socket.recv(_READ_BYTES)
                if not data:
                    self._close(connection)
                    return
                for message in connection.decoder.feed(data):
                    self._on_request(connection, message, len(data))
                if len(data) < _READ_BYTES:
                    break
        except BlockingIOError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not isinstance(error, ConnectionError):
                log.error("task process %d does not speak our protocol: %s", connection.process.pid, error)
            self._close(connection)
            return
        self._update_events(connection)

    def _on_process_end(self, connection: Connection, _events: int) -> None:
        """The process has ended; what it said before counts."""
        if connection.process.exit_fd is not None:
            self._selector.unregister(connection.process.exit_fd)
        self._read(connection)
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        if not connection.is_open:
            return
        connection.is_open = False
        self._connections.pop(connection.socket.fileno(), None)
        self._selector.unregister(connection.socket)
        connection.socket.close()
        live = connection.live
        if live is not None and live.died_at is None:
            live.died_at = time.monotonic()
            if not live.is_ending:
                self._see_end(connection.process, live)
        if live is None:
            self._release(connection.process)

    def _see_end(self, process: ChildProcess, live: Live) -> None:
        """Make sure that the process has ended, and ask the parent how."""
        if process.is_alive() and not process.wait_gone(_CLOSING_SECONDS):
            # A task may close descriptors that are not its own. Without a connection it cannot be told anything.
            process.kill_tree(f"{ATTEMPT_VARIABLE}={live.attempt_id}")
            process.wait_gone(_CLOSING_SECONDS)
        if self._has_parent:
            self._tell({"op": "how_ended", "pid": process.pid})

    def _release(self, process: ChildProcess) -> None:
        """Stop watching a process nobody needs to know about any more."""
        if process.exit_fd is not None:
            try:
                self._selector.unregister(process.exit_fd)
            except (KeyError, ValueError):
                pass
        process.close()
        self._exits.pop(process.pid, None)

    def _update_events(self, connection: Connection) -> None:
        if not connection.is_open:
            return
        wanted = selectors.EVENT_READ if connection.backlog <= _BACKLOG_BYTES else 0
        if connection.outgoing:
            wanted |= selectors.EVENT_WRITE
        if wanted == connection.events:
            return
        data = partial(self._on_child, connection)
        if not connection.events:
            self._selector.register(connection.socket, wanted, data)
        elif wanted:
            self._selector.modify(connection.socket, wanted, data)
        else:
            self._selector.unregister(connection.socket)
        connection.events = wanted

    def _reply(self, connection: Connection | None, message: Mapping[str, Any]) -> None:
        if connection is None or not connection.is_open:
            return
        connection.outgoing += encode_frame(message)
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        try:
            sent = connection.socket.send(connection.outgoing)
            del connection.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
            return
        self._update_events(connection)

    # --- requests

    def _on_request(self, connection: Connection, message: dict[str, Any], size: int) -> None:
        op = message["op"]
        if op == "claim":
            self._on_claim(connection, message)
            return
        if op == "bundle":
            self._on_bundle(connection, message["hash"])
            return
        live = connection.live
        if live is None:
            if op not in ("log", "started", "finish"):
                self._reply(connection, {"error": "this process runs no attempt", "ok": False})
            return
        if op == "started":
            self._on_started(live, message)
            return
        if op not in ("finish", "log", "xcom_push", "xcom_pull", "task_states"):
            raise ValueError(f"unknown request {op!r}")
        request = Request(op=op, message=message, connection=connection, live=live, size=size)
        if message.get("lines"):
            request.seq = live.next_seq
            live.next_seq += 1
        if op == "finish":
            live.is_ending = True
        connection.backlog += size
        self._pending.append(request)

    def _on_claim(self, connection: Connection, message: dict[str, Any]) -> None:
        attempt_id = message["attempt_id"]
        if attempt_id in self._live or attempt_id in self._claiming:
            self._reply(connection, {"work": None})
            return
        self._last_claim_at = time.monotonic()
        if self._is_draining:
            self._pending.append(Request(op="hand_back", message=message, connection=connection))
            return
        self._claiming.add(attempt_id)
        self._pending.append(Request(op="claim", message=message, connection=connection))

    def _on_started(self, live: Live, message: Mapping[str, Any]) -> None:
        live.retry = RetrySettings(
            retries=live.retry.retries,
            delay=message["retry_delay"],
            backoff_multiplier=message["backoff_multiplier"],
            max_delay=message["max_retry_delay"],
        )
        live.timeout_seconds = message["timeout"]
        if live.timeout_seconds is not None:
            live.kill_at = time.monotonic() + live.timeout_seconds + self._settings.worker.kill_grace

    def _on_bundle(self, connection: Connection, bundle_hash: str) -> None:
        self._bundles_wanted.setdefault(bundle_hash, []).append(connection)
        self._fetcher.fetch(bundle_hash, [one.bundle_hash for one in self._live.values()])

    def _on_fetched(self, bundle_hash: str, folder: str | None, error: str | None) -> None:
        """In the fetcher's thread."""
        self._fetched.append((bundle_hash, folder, error))
        os.write(self._wake_writer, b"!")

    def _on_wake(self, _events: int) -> None:
        os.read(self._wake_reader, 4096)
        while self._fetched:
            bundle_hash, folder, error = self._fetched.pop(0)
            if folder is not None:
                self._bundle_folders[bundle_hash] = folder
            for connection in self._bundles_wanted.pop(bundle_hash, []):
                self._reply(connection, {"error": error} if error else {"path": folder})

    # --- the transaction

    def _work(self) -> None:
        """Renew when it is time, and do what is pending."""
        if time.monotonic() < self._retry_at:
            return
        try:
            if self._lease.is_due():
                self._renew()
            if self._pending:
                self._commit_pending()
        except StoreUnavailableError as error:
            self._database_is_away(error)
        else:
            self._database_is_back()

    def _commit_pending(self) -> None:
        requests, self._pending = self._pending, []
        try:
            self._settle_all(requests, commit(self._store, self._identity, requests))
            return
        except Exception as error:
            if is_outage(error):
                self._keep(requests)
                raise StoreUnavailableError(str(error)) from error
            if len(requests) > 1:
                log.warning("a batch of %d requests was refused (%s); trying one by one", len(requests), _short(error))
            else:
                self._refuse(requests[0], error)
                return
        self._commit_one_by_one(requests)

    def _commit_one_by_one(self, requests: list[Request]) -> None:
        for position, request in enumerate(requests):
            try:
                answers = commit(self._store, self._identity, [request])
            except Exception as error:
                if is_outage(error):
                    self._keep(requests[position:])
                    raise StoreUnavailableError(str(error)) from error
                self._refuse(request, error)
            else:
                self._settle_all([request], answers)

    def _keep(self, requests: list[Request]) -> None:
        for request in requests:
            request.is_repeat = True
        self._pending = requests + self._pending

    def _refuse(self, request: Request, error: Exception) -> None:
        """The database will never take this request: it fails alone."""
        log.error("request %s was refused: %s", request.op, _short(error))
        self._done_with(request)
        match request.op:
            case "claim":
                self._claiming.discard(request.message["attempt_id"])
                self._reply(request.connection, {"work": None})
            case "hand_back":
                self._reply(request.connection, {"work": None})
            case "finish" if request.connection is not None:
                self._pending.append(_unstorable(request, error))
            case "finish" | "died":
                assert request.live is not None
                self._forget(request.live)  # the next renewal finds the row and hands it back
            case "log":
                pass
            case _:
                self._reply(request.connection, {"error": _short(error)})

    def _settle_all(self, requests: list[Request], answers: list[Answer]) -> None:
        has_ended = False
        for request, answer in zip(requests, answers, strict=True):
            self._done_with(request)
            self._settle(request, answer)
            change = answer.change
            has_ended |= answer.is_applied and change is not None and change.to_state is not TaskState.RUNNING
        if has_ended:
            self._ringer.ring()

    def _done_with(self, request: Request) -> None:
        connection = request.connection
        if connection is not None and request.size:
            connection.backlog -= request.size
            if connection.is_open:
                self._update_events(connection)

    def _settle(self, request: Request, answer: Answer) -> None:
        match request.op:
            case "claim":
                self._settle_claim(request, answer)
            case "hand_back":
                self._reply(request.connection, {"work": None})
            case "finish":
                assert request.live is not None
                if not answer.is_applied:
                    log.warning("the end of attempt %s of %s came too late", request.live.attempt_id, request.live.name)
                self._forget(request.live)
            case "died":
                assert request.live is not None
                if answer.is_applied and answer.change is not None and answer.change.reason is not Reason.CLEARED:
                    log.warning("attempt %s of %s: %s", request.live.attempt_id, request.live.name, answer.change.cause)
                self._forget(request.live)
            case "xcom_push":
                self._reply(request.connection, {"ok": answer.is_applied})
            case "xcom_pull":
                self._reply(request.connection, {"values": [list(one) for one in answer.data]})
            case "task_states":
                self._reply(request.connection, {"states": answer.data})

    def _settle_claim(self, request: Request, answer: Answer) -> None:
        connection = request.connection
        assert connection is not None
        self._claiming.discard(request.message["attempt_id"])
        work = answer.work
        if work is None:
            self._reply(connection, {"work": None})
            return
        self._claimed += 1
        live = Live(
            ti_id=work.ti_id,
            attempt_id=work.attempt_id,
            run_pk=work.run_pk,
            name=f"{work.dag_id}.{work.task_id}",
            seed=f"{work.dag_id}|{work.run_id}|{work.task_id}|{work.map_index}",
            bundle_hash=work.bundle_hash,
            user_failures=work.user_failures,
            retry=self._default_retry(work.retries),
            process=connection.process,
            claimed_at=time.monotonic(),
        )
        connection.live = live
        self._live[live.attempt_id] = live
        if not connection.is_open:
            live.died_at = time.monotonic()  # it died while its claim was being committed
            self._see_end(connection.process, live)
            return
        self._reply(connection, {"work": work_to_json(work), "bundle_path": self._folder(work.bundle_hash)})

    def _folder(self, bundle_hash: str) -> str | None:
        folder = self._bundle_folders.get(bundle_hash)
        if folder is not None and not os.path.isdir(folder):
            del self._bundle_folders[bundle_hash]
            return None
        return folder

    def _default_retry(self, retries: int) -> RetrySettings:
        delay = self._settings.core.default_task_retry_delay
        return RetrySettings(retries=retries, delay=delay, backoff_multiplier=0.0, max_delay=None)

    def _forget(self, live: Live) -> None:
        self._live.pop(live.attempt_id, None)
        for connection in self._connections.values():
            if connection.live is live:
                connection.live = None
                return
        if live.died_at is not None:
            self._release(live.process)

    def _database_is_away(self, error: StoreUnavailableError) -> None:
        if self._has_database:
            self._has_database = False
            log.warning("the database is away, waiting: %s", _short(error))
            self._tell_status()
        self._retry_at = time.monotonic() + self._pause * random.uniform(0.5, 1.0)  # noqa: S311 jitter
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        if not self._has_parent and self._lease.is_over():
            log.warning("giving up handing %d attempts back; they are rescued by their lease", len(self._live))
            self._live.clear()
            self._pending.clear()

    def _database_is_back(self) -> None:
        if not self._has_database:
            self._has_database = True
            log.info("the database is back")
            self._tell_status()
        self._pause = _FIRST_PAUSE_SECONDS
        self._retry_at = 0.0

    # --- looking after running attempts

    def _look_after(self) -> None:
        """Act on what time or the system has done: deaths, limits, orders that were not followed."""
        now = time.monotonic()
        if now >= self._next_parent_check_at:
            self._next_parent_check_at = now + _PARENT_CHECK_SECONDS
            if self._has_parent and os.getppid() != self._config.parent_pid:
                self._lost_parent()
        if not self._live:
            return
        self._sample(now)
        for live in list(self._live.values()):
            if live.is_ending:
                continue
            if live.died_at is not None:
                self._bury(live, now)
            elif self._drain_at is not None and now >= self._drain_at and live.kind is not EndKind.WORKER_LOST:
                self._kill(live, EndKind.DRAIN)
            elif live.kill_at is not None and now >= live.kill_at:
                self._kill(live, EndKind.TIMEOUT)

    def _bury(self, live: Live, now: float) -> None:
        """Its process is gone without a word. The parent says how; what we did to it ourselves we know."""
        assert live.died_at is not None
        pid = live.process.pid
        if not live.is_killed:
            # What it left behind; also, a process it forked keeps its parent from noticing its death.
            live.is_killed = True
            live.process.kill_tree(f"{ATTEMPT_VARIABLE}={live.attempt_id}")
        if live.kind is None and pid not in self._exits and now < live.died_at + _STATUS_WAIT_SECONDS:
            return
        exit_code = self._exits[pid].code if pid in self._exits else None
        is_out_of_memory = exit_code in (None, -signal.SIGKILL) and live.kind is None and self._oom.has_risen()
        live.is_ending = True
        self._pending.append(
            Request(op="died", message={}, live=live, exit_code=exit_code, is_out_of_memory=is_out_of_memory)
        )

    def _sample(self, now: float) -> None:
        """Remember the peak memory of running tasks; after an end by SIGKILL nobody else knows."""
        if now < self._next_sample_at:
            return
        self._next_sample_at = now + _SAMPLE_SECONDS
        for live in self._live.values():
            if live.died_at is None and now - live.claimed_at >= _SAMPLE_SECONDS / 2:
                live.peak_rss_bytes = live.process.peak_rss_bytes() or live.peak_rss_bytes

    def _cancel(self, live: Live, by: str | None) -> None:
        live.cancelled_by = by or "unknown"
        live.kind = live.kind or EndKind.CANCEL
        log.info("cancelling attempt %s of %s for %s", live.attempt_id, live.name, live.cancelled_by)
        live.process.signal(signal.SIGUSR1)
        live.kill_at = time.monotonic() + self._settings.worker.kill_grace

    def _kill(self, live: Live, kind: EndKind) -> None:
        if live.is_killed:
            return
        live.is_killed = True
        live.kind = kind if kind is EndKind.NOT_OURS else live.kind or kind
        live.kill_at = None
        live.process.kill_tree(f"{ATTEMPT_VARIABLE}={live.attempt_id}")

    def _seconds_to_next(self) -> float:
        """How long the loop may wait for events."""
        now = time.monotonic()
        at = [now + max(self._lease.due_at - boot_seconds(), 0.0)]
        if self._pending:
            at.append(now)
        if self._live:
            at.append(self._next_sample_at)
            at += self._instants()
        if not _HAS_PIDFD:
            at.append(self._next_parent_check_at)
        return max(max(min(at), self._retry_at) - now, 0.0)

    def _instants(self) -> Iterator[float]:
        for live in self._live.values():
            if live.is_ending:
                continue
            if live.died_at is not None:
                is_known = live.kind is not None or live.process.pid in self._exits
                yield live.died_at + (0.0 if is_known else _STATUS_WAIT_SECONDS)
                continue
            if live.kill_at is not None:
                yield live.kill_at
            if self._drain_at is not None and not live.is_killed:
                yield self._drain_at


def _unstorable(request: Request, error: Exception) -> Request:
    """What the task returned cannot be stored. Its effects have happened, so trying it again would help nobody."""
    message = {"reason": Reason.FAIL_RAISED, "cause": f"the result of the task cannot be stored: {_short(error)}"}
    if request.message.get("xcoms"):
        message["lines"] = request.message["lines"]  # not to blame
    return Request(op="finish", message=message, live=request.live, seq=request.seq)


class Exit(NamedTuple):
    """How a child ended, and when we heard."""

    code: int | None
    at: float


class Ringer:
    """Rings the doorbell from a thread: a slow Redis must not hold the loop. Rings that meet become one."""

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._wanted = threading.Event()
        self._is_finished = False
        self._thread = threading.Thread(target=self._serve, name="dflow-ringer", daemon=True)
        self._thread.start()

    def ring(self) -> None:
        """Ring soon."""
        self._wanted.set()

    def finish(self) -> None:
        """Ring what is wanted and end; bounded."""
        self._is_finished = True
        self._wanted.set()
        self._thread.join(2.0)

    def _serve(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            self._doorbell.ring()
            if self._is_finished:
                return


_HAS_PIDFD: Final = hasattr(os, "pidfd_open")


def is_outage(error: Exception) -> bool:
    """Is it the database's trouble, to be waited out, rather than something wrong with the request?

    Judged by the class of the SQLSTATE; psycopg2 puts it on the original error.
    """
    if isinstance(error, StoreUnavailableError):
        return True
    state = getattr(getattr(error, "orig", None), "pgcode", None)
    return isinstance(state, str) and state[:2] in _OUTAGE_CLASSES


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(256)
    listener.setblocking(False)
    return listener


def _peer_pid(sock: socket.socket) -> int | None:
    """Return the pid at the other end when it is of our own user (unix(7), SO_PEERCRED)."""
    if not hasattr(socket, "SO_PEERCRED"):
        raise DflowError("task processes can be identified on Linux only")
    pid, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid if uid == os.getuid() else None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__

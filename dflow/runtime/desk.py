"""What task processes ask of their agent, from the request to the answer.

Requests wait in one list; `commit` does them all in one transaction and answers. When the database is away they stay in
the list. When it refuses a batch, each request is tried alone, so that one bad request cannot fail the others; one that
is refused alone is answered with an error, or, where it was an end, becomes a failure with that cause.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from dflow.core.errors import StoreUnavailableError
from dflow.core.states import Reason, TaskState
from dflow.runtime.bundles import Shelf
from dflow.runtime.commit import Answer, Identity, commit, is_outage
from dflow.runtime.ends import EndKind, RetrySettings
from dflow.runtime.live import Connection, Live, Request
from dflow.runtime.processes import ChildProcess
from dflow.runtime.protocol import Work, work_to_json
from dflow.runtime.switchboard import Switchboard
from dflow.runtime.wards import Wards
from dflow.settings import Settings
from dflow.store.engine import Store
from dflow.store.workers import RunningAttempt

log = logging.getLogger(__name__)

_BATCH_BYTES: Final = 16 * 1024 * 1024
_BATCH_REQUESTS: Final = 1000
_ATTEMPT_OPS = frozenset({"finish", "log", "xcom_push", "xcom_pull", "task_states"})
_UNANSWERED = frozenset({"finish", "log", "started"})


class Desk:
    """The requests on their way. ``on_end`` is called after each commit in which an attempt ended or was given back."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        wards: Wards,
        shelf: Shelf,
        on_end: Callable[[], None],
    ) -> None:
        self._default_delay = settings.core.default_task_retry_delay
        self._store = store
        self._wards = wards
        self._shelf = shelf
        self._on_end = on_end
        self.switchboard: Switchboard | None = None  # set by whoever makes both
        self.pending: list[Request] = []
        self.claiming: set[str] = set()  # attempt ids of claims on their way to the database
        self.claimed = 0  # attempts, so far
        self.last_claim_at = time.monotonic()  # monotonic; also of those that were refused
        self.is_draining = False

    # Taking requests in

    def take(self, connection: Connection, message: dict[str, Any], size: int) -> None:
        """A task process asks. Raises ValueError, KeyError or TypeError for what is no request."""
        op = message["op"]
        live = connection.live
        if op == "claim":
            self._take_claim(connection, message)
        elif op == "bundle":
            in_use = [one.bundle_hash for one in self._wards.live.values()]
            self._shelf.ask(message["hash"], in_use, lambda answer: self._reply(connection, answer))
        elif live is None:
            if op not in _UNANSWERED:
                self._reply(connection, {"error": "this process runs no attempt"})
        elif op == "started":
            self._take_limits(live, message)
        elif op in _ATTEMPT_OPS:
            self._take_for_attempt(connection, live, message, size)
        else:
            raise ValueError(f"unknown request {op!r}")

    def hand_back_unknown(self, row: RunningAttempt) -> None:
        """The database says we run it and we do not: a claim whose commit we never heard of, its process gone."""
        log.warning("attempt %s is ours in the database and not here; handing it back", row.attempt_id)
        live = Live(
            ti_id=row.ti_id,
            attempt_id=row.attempt_id,
            run_pk=0,
            name="",
            seed=str(row.ti_id),
            bundle_hash="",
            user_failures=0,
            retry=self._default_retry(0),
            process=ChildProcess(os.getpid()),  # never signalled: the attempt is ending already
            claimed_at=time.monotonic(),
            kind=EndKind.WORKER_LOST,
            died_at=time.monotonic(),
            is_ending=True,
            is_killed=True,
        )
        self.pending.append(Request(op="died", message={}, live=live))

    def drop_attempts(self) -> None:
        """The attempts are others' now: what is pending about them is void."""
        self.pending = [one for one in self.pending if one.live is None]

    def _take_claim(self, connection: Connection, message: dict[str, Any]) -> None:
        attempt_id = message["attempt_id"]
        if attempt_id in self._wards.live or attempt_id in self.claiming:
            self._reply(connection, {"work": None})
            return
        self.last_claim_at = time.monotonic()
        if self.is_draining:
            self.pending.append(Request(op="hand_back", message=message, connection=connection))
            return
        self.claiming.add(attempt_id)
        self.pending.append(Request(op="claim", message=message, connection=connection))

    def _take_limits(self, live: Live, message: Mapping[str, Any]) -> None:
        live.retry = RetrySettings(
            retries=live.retry.retries,
            delay=message["retry_delay"],
            backoff_multiplier=message["backoff_multiplier"],
            max_delay=message["max_retry_delay"],
        )
        self._wards.limit(live, message["timeout"])

    def _take_for_attempt(self, connection: Connection, live: Live, message: dict[str, Any], size: int) -> None:
        request = Request(op=message["op"], message=message, connection=connection, live=live, size=size)
        if message.get("lines"):
            request.seq = live.next_seq
            live.next_seq += 1
        if request.op == "finish":
            live.is_ending = True
        connection.backlog += size
        self.pending.append(request)

    # The transaction

    def commit(self, identity: Identity) -> None:
        """Do what is pending, within reason. Raises StoreUnavailableError when the database is away, keeping it all."""
        if requests := self._next_batch():
            self._commit(identity, requests)

    def _next_batch(self) -> list[Request]:
        """Take what may go together from the front: after an outage more may wait than a statement should carry."""
        size = 0
        for count, request in enumerate(self.pending, start=1):
            size += request.size
            if size > _BATCH_BYTES or count == _BATCH_REQUESTS:
                batch, self.pending = self.pending[:count], self.pending[count:]
                return batch
        batch, self.pending = self.pending, []
        return batch

    def _commit(self, identity: Identity, requests: list[Request]) -> None:
        try:
            answers = self._try(identity, requests)
        except StoreUnavailableError:
            self._keep(requests)
            raise
        except Exception as error:  # noqa: BLE001 whatever one of them caused
            if len(requests) > 1:
                log.warning("a batch of %d requests was refused (%s); trying one by one", len(requests), _short(error))
                self._commit_one_by_one(identity, requests)
            else:
                self._refuse(requests[0], error)
        else:
            self._settle_all(requests, answers)

    def _commit_one_by_one(self, identity: Identity, requests: list[Request]) -> None:
        for position, request in enumerate(requests):
            try:
                answers = self._try(identity, [request])
            except StoreUnavailableError:
                self._keep(requests[position:])
                raise
            except Exception as error:  # noqa: BLE001 it fails alone
                self._refuse(request, error)
            else:
                self._settle_all([request], answers)

    def _try(self, identity: Identity, requests: list[Request]) -> list[Answer]:
        try:
            return commit(self._store, identity, requests)
        except Exception as error:
            if is_outage(error) and not isinstance(error, StoreUnavailableError):
                raise StoreUnavailableError(_short(error)) from error
            raise

    def _keep(self, requests: list[Request]) -> None:
        for request in requests:
            request.is_repeat = True
        self.pending = requests + self.pending

    # Answers

    def _settle_all(self, requests: list[Request], answers: list[Answer]) -> None:
        has_ended = False
        for request, answer in zip(requests, answers, strict=True):
            self._done(request)
            self._settle(request, answer)
            change = answer.change
            has_ended |= answer.is_applied and change is not None and change.to_state is not TaskState.RUNNING
        if has_ended:
            self._on_end()

    def _settle(self, request: Request, answer: Answer) -> None:
        match request.op:
            case "claim":
                self._settle_claim(request, answer.work)
            case "hand_back":
                self._reply(request.connection, {"work": None})
            case "finish" | "died":
                self._settle_end(request, answer)
            case "xcom_push":
                self._reply(request.connection, {"ok": answer.is_applied})
            case "xcom_pull":
                self._reply(request.connection, {"values": [list(one) for one in answer.data]})
            case "task_states":
                self._reply(request.connection, {"states": answer.data})

    def _settle_claim(self, request: Request, work: Work | None) -> None:
        connection = request.connection
        assert connection is not None
        self.claiming.discard(request.message["attempt_id"])
        if work is None:
            self._reply(connection, {"work": None})
            return
        self.claimed += 1
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
        self._wards.add(live)
        if connection.is_open:
            self._reply(connection, {"work": work_to_json(work), "bundle_path": self._shelf.folder(work.bundle_hash)})
        else:
            self._wards.lost(live)  # it died while its claim was being committed

    def _settle_end(self, request: Request, answer: Answer) -> None:
        live, change = request.live, answer.change
        assert live is not None
        if request.op == "finish":
            if not answer.is_applied:
                log.warning("the end of attempt %s of %s came too late", live.attempt_id, live.name)
        elif answer.is_applied and change is not None and change.reason is not Reason.CLEARED:
            log.warning("attempt %s of %s: %s", live.attempt_id, live.name, change.cause)
        self._forget(live, request.connection)

    def _refuse(self, request: Request, error: Exception) -> None:
        """The database will never take this request."""
        log.error("request %s was refused: %s", request.op, _short(error))
        self._done(request)
        match request.op:
            case "claim" | "hand_back":
                self.claiming.discard(request.message["attempt_id"])
                self._reply(request.connection, {"work": None})
            case "finish" if not request.is_substitute:
                self.pending.append(_unstorable(request, error))
            case "finish" | "died":
                assert request.live is not None
                self._forget(request.live, request.connection)  # the next renewal finds the row and hands it back
            case "log":
                pass
            case _:
                self._reply(request.connection, {"error": _short(error)})

    def _forget(self, live: Live, connection: Connection | None) -> None:
        self._wards.forget(live)
        if connection is not None and connection.live is live:
            connection.live = None
        if live.died_at is not None and self.switchboard is not None:
            self.switchboard.release(live.process)

    def _done(self, request: Request) -> None:
        if self.switchboard is not None:
            self.switchboard.done(request.connection, request.size)

    def _reply(self, connection: Connection | None, message: Mapping[str, Any]) -> None:
        if self.switchboard is not None:
            self.switchboard.reply(connection, message)

    def _default_retry(self, retries: int) -> RetrySettings:
        return RetrySettings(retries=retries, delay=self._default_delay, backoff_multiplier=0.0, max_delay=None)


def _unstorable(request: Request, error: Exception) -> Request:
    """What the task returned cannot be stored. Its effects have happened, so trying it again would help nobody."""
    message = {"reason": Reason.FAIL_RAISED, "cause": f"the result of the task cannot be stored: {_short(error)}"}
    if request.message.get("xcoms"):
        message["lines"] = request.message["lines"]  # not to blame
    return Request(
        op="finish",
        message=message,
        connection=request.connection,
        live=request.live,
        seq=request.seq,
        is_substitute=True,
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__

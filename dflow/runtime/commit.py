"""Many requests of many task processes as one transaction of few statements.

One statement each stores all log chunks, all XComs and all changes of state (ends and claims together); one reads what
claimed attempts need to know. The answers come back in the order of the requests and are true only once the
transaction is committed. Everything may be done again after a commit whose outcome is unknown: chunks and XComs
overwrite themselves, and a repeated claim or end recognises its own row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from dflow.core.errors import StoreUnavailableError
from dflow.core.states import Reason, TaskState
from dflow.runtime.ends import Facts, died, reported
from dflow.runtime.live import Live, Request
from dflow.runtime.logs import storable
from dflow.runtime.protocol import Work
from dflow.store import logs, tasks, xcoms
from dflow.store.apply import Change, apply
from dflow.store.engine import Store, Tx

_OUTAGE_CLASSES: Final = frozenset({"08", "25", "40", "53", "55", "57", "58", "XX"})  # Postgres manual, appendix A


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who writes: the worker incarnation and where it is."""

    worker_id: str
    actor: str  # in events: "worker w1@host"
    hostname: str
    infra_retries: int
    max_retry_delay: float


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of one request."""

    is_applied: bool = True
    work: Work | None = None  # for claims
    change: Change | None = None  # for ends
    data: Any = None  # for reads


def commit(store: Store, identity: Identity, requests: Sequence[Request]) -> list[Answer]:
    """Do all requests in one transaction and return their answers.

    Raises StoreUnavailableError when the database is away (the outcome may be unknown), or what a request caused: then
    nothing was done. Does not wait for the disk when nothing but log lines is stored.
    """
    is_sync = any(request.op not in ("log", "xcom_pull", "task_states") for request in requests)
    return store.run(lambda tx: _execute(tx, identity, requests), sync=is_sync)


def is_outage(error: Exception) -> bool:
    """Is it the database's trouble, to be waited out, rather than something wrong with the request?

    Judged by the class of the SQLSTATE; psycopg2 puts it on the original error.
    """
    if isinstance(error, StoreUnavailableError):
        return True
    state = getattr(getattr(error, "orig", None), "pgcode", None)
    return isinstance(state, str) and state[:2] in _OUTAGE_CLASSES


def _execute(tx: Tx, identity: Identity, requests: Sequence[Request]) -> list[Answer]:
    answers = [Answer() for _ in requests]
    _store_lines(tx, requests)
    current = _store_xcoms(tx, requests)
    changes: dict[int, Change] = {}
    for position, request in enumerate(requests):
        match request.op:
            case "claim" | "hand_back" | "finish" | "died":
                change = _change(tx, identity, request)
                if change is None:
                    answers[position].is_applied = False
                else:
                    answers[position].change = changes[position] = change
            case "xcom_push":
                answers[position].is_applied = _live(request).attempt_id in current
            case "xcom_pull" | "task_states":
                answers[position].data = _read(tx, request)
    applied = {(one.ti_id, one.attempt_id, one.to_state) for one in apply(tx, list(changes.values()))}
    for position, change in changes.items():
        left_with = None if change.to_state is TaskState.SCHEDULED else change.attempt_id
        is_applied = (change.ti_id, left_with, change.to_state) in applied
        if not is_applied and requests[position].is_repeat:
            is_applied = _was_applied(tx, change)
        answers[position].is_applied = is_applied
    _describe_claims(tx, requests, answers)
    return answers


def _store_lines(tx: Tx, requests: Sequence[Request]) -> None:
    chunks = [
        logs.Chunk(
            attempt_id=request.live.attempt_id,
            seq=request.seq,
            ti_id=request.live.ti_id,
            lines=request.message["lines"],
        )
        for request in requests
        if request.live is not None and request.message.get("lines")
    ]
    if chunks:
        logs.append(tx, chunks)


def _store_xcoms(tx: Tx, requests: Sequence[Request]) -> set[str]:
    new = [
        xcoms.NewXCom(ti_id=request.live.ti_id, attempt_id=request.live.attempt_id, key=key, value=value)
        for request in requests
        if request.live is not None
        for key, value in _values(request)
    ]
    return xcoms.put_many(tx, new) if new else set()


def _values(request: Request) -> list[tuple[str, Any]]:
    if request.op == "xcom_push":
        return [(request.message["key"], request.message["value"])]
    if request.op == "finish":
        return list((request.message.get("xcoms") or {}).items())
    return []


def _change(tx: Tx, identity: Identity, request: Request) -> Change | None:
    match request.op:
        case "claim":
            assert request.connection is not None
            return Change(
                ti_id=request.message["ti_id"],
                from_state=TaskState.QUEUED,
                to_state=TaskState.RUNNING,
                reason=Reason.CLAIMED,
                attempt_id=request.message["attempt_id"],
                actor=identity.actor,
                worker_id=identity.worker_id,
                hostname=identity.hostname,
                pid=request.connection.process.pid,
            )
        case "hand_back":
            return Change(
                ti_id=request.message["ti_id"],
                from_state=TaskState.QUEUED,
                to_state=TaskState.SCHEDULED,
                reason=Reason.WORKER_DRAINED,
                attempt_id=request.message["attempt_id"],
                actor=identity.actor,
            )
        case "finish":
            live = _live(request)
            return reported(
                {**request.message, "cause": _text(request.message.get("cause"))},
                ti_id=live.ti_id,
                attempt_id=live.attempt_id,
                actor=identity.actor,
                is_cancelled=live.cancelled_by is not None,
                cancelled_by=live.cancelled_by,
            )
        case _:
            return _died(tx, identity, request)


def _died(tx: Tx, identity: Identity, request: Request) -> Change | None:
    """The budgets are read now: the row, not our memory, knows them. Rare, so one query for each."""
    live = _live(request)
    row = tasks.get_by_id(tx, live.ti_id)
    if row is None or row.attempt_id != live.attempt_id:
        return None
    facts = Facts(
        ti_id=live.ti_id,
        attempt_id=live.attempt_id,
        seed=live.seed,
        pid=live.process.pid,
        kind=live.kind,
        cancelled_by=live.cancelled_by or row.cancelled_by,
        timeout_seconds=live.timeout_seconds,
        exit_code=request.exit_code,
        is_out_of_memory=request.is_out_of_memory,
        peak_rss_bytes=live.peak_rss_bytes,
        user_failures=row.user_failures,
        retry=live.retry,
        infra_failures=row.infra_failures,
        infra_retries=identity.infra_retries,
        max_retry_delay=identity.max_retry_delay,
    )
    return died(facts, actor=identity.actor)


def _was_applied(tx: Tx, change: Change) -> bool:
    """Was this change made by the commit whose outcome we never heard?"""
    row = tasks.get_by_id(tx, change.ti_id)
    if row is None or row.attempt_id != change.attempt_id or row.state != change.to_state:
        return False
    return change.to_state is not TaskState.RUNNING or (row.worker_id == change.worker_id and row.pid == change.pid)


def _describe_claims(tx: Tx, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
    claims = {
        request.message["ti_id"]: answer
        for request, answer in zip(requests, answers, strict=True)
        if request.op == "claim" and answer.is_applied
    }
    if claims:
        for row in tasks.describe_claimed(tx, list(claims)):
            claims[row.ti_id].work = Work(**{name: getattr(row, name) for name in _WORK_FIELDS})


def _read(tx: Tx, request: Request) -> Any:
    live, message = _live(request), request.message
    if request.op == "task_states":
        return tasks.states(tx, live.run_pk, message["task_ids"])
    return xcoms.pull(
        tx,
        live.run_pk,
        key=message["key"],
        task_ids=message.get("task_ids"),
        map_indexes=message.get("map_indexes"),
        dag_id=message.get("dag_id"),
        run_id=message.get("run_id"),
        include_prior_dates=bool(message.get("include_prior_dates")),
    )


def _live(request: Request) -> Live:
    assert request.live is not None
    return request.live


def _text(value: str | None) -> str | None:
    return None if value is None else storable(value)[:2000]


_WORK_FIELDS = tuple(Work.__dataclass_fields__)

"""What passes between a task's process and its agent: plain data and length-prefixed JSON frames.

A worker machine has one agent process that owns the Postgres connection. Task processes reach it over a Unix socket
and speak the small set of requests below; `AttemptClient` is that set as a Protocol, so that the same runner works
against the agent and, for `dag.test()`, against an in-memory client with no service at all.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Final, Protocol

from dflow.core.states import Reason

SOCKET_VARIABLE: Final = "DFLOW_AGENT_SOCKET"  # the agent's Unix socket, in the environment of task processes
ATTEMPT_VARIABLE: Final = "DFLOW_ATTEMPT_ID"  # the running attempt; processes a task starts inherit it
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All a task process needs to run one attempt; the answer to a successful claim."""

    ti_id: int
    attempt_id: str
    run_pk: int
    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    try_number: int  # of this attempt, 1 for the first
    user_failures: int  # before this attempt
    retries: int
    run_type: str
    logical_date: datetime | None
    data_interval_start: datetime | None
    data_interval_end: datetime | None
    run_after: datetime
    run_started_at: datetime | None
    conf: Mapping[str, Any]
    bundle_hash: str
    path: str  # of the DAG file inside the bundle
    queue: str
    pool: str
    priority_weight: int
    hostname: str
    started_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended, as its own process saw it.

    ``reason`` is one of SUCCEEDED, SKIP_RAISED, RAISED, FAIL_RAISED, TIMEOUT, LOAD_FAILED, CANCELLED, EXITED. For
    RAISED, TIMEOUT, LOAD_FAILED and EXITED ``retry_delay_seconds`` is the delay before the next try; ``None`` there
    means the task has no try left.
    """

    reason: Reason
    cause: str | None = None  # one line for people: "ValueError: bad zone"
    retry_delay_seconds: float | None = None
    exit_code: int | None = None
    peak_rss_bytes: int | None = None
    xcoms: Mapping[str, Any] = field(default_factory=dict)  # key -> JSON value, e.g. {"return_value": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of a task's log. ``at`` is seconds since the epoch, ``source`` a logger name, "stdout" or "stderr"."""

    at: float
    level: str
    source: str
    text: str


class AttemptClient(Protocol):
    """What a running attempt may ask of the world."""

    def push_xcom(self, key: str, value: Any) -> None:
        """Store a JSON value now, fenced by the attempt; raises StaleAttemptError when it is no longer ours."""

    def pull_xcoms(
        self,
        *,
        task_ids: Sequence[str] | None,
        key: str,
        map_indexes: Sequence[int] | None = None,
        dag_id: str | None = None,
        run_id: str | None = None,
        include_prior_dates: bool = False,
    ) -> list[tuple[str, int, Any]]:
        """Return ``(task_id, map_index, value)`` of the stored values, ordered by task id and map index."""

    def task_states(self, task_ids: Sequence[str]) -> dict[str, str]:
        """Return the states of task instances of the same run."""

    def log(self, lines: Sequence[LogLine]) -> None:
        """Hand log lines over; they reach Postgres within about `worker.log_flush_interval` seconds."""


def encode_frame(message: Mapping[str, Any]) -> bytes:
    """Return one message as it goes over the socket: four bytes of length, then UTF-8 JSON.

    Raises ValueError for a message over `MAX_FRAME_BYTES`, TypeError for a value JSON does not have.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def write_frame(sock: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one message over a blocking socket."""
    sock.sendall(encode_frame(message))


def read_frame(sock: socket.socket) -> dict[str, Any] | None:
    """Receive one message from a blocking socket; None when the other side has closed the connection."""
    header = _read_exactly(sock, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    body = _read_exactly(sock, length)
    return None if body is None else _decode(body)


class FrameDecoder:
    """Cuts what arrives from a non-blocking socket into messages."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add received bytes; return the messages complete by now. Raises ValueError for what is no message."""
        buffer = self._buffer
        buffer += data
        messages = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            messages.append(_decode(bytes(buffer[start + _LENGTH.size : end])))
            start = end
        if start:
            del buffer[:start]
        return messages


def work_to_json(work: Work) -> dict[str, Any]:
    """Return the work as plain JSON; instants become ISO 8601 text."""
    data = {name: getattr(work, name) for name in _WORK_FIELDS}
    for name in _WORK_INSTANTS:
        if data[name] is not None:
            data[name] = data[name].isoformat()
    return data


def work_from_json(data: Mapping[str, Any]) -> Work:
    """The reverse of `work_to_json`."""
    values = dict(data)
    for name in _WORK_INSTANTS:
        if values[name] is not None:
            values[name] = datetime.fromisoformat(values[name])
    return Work(**values)


_WORK_FIELDS: Final = tuple(f.name for f in fields(Work))
_WORK_INSTANTS: Final = (
    "logical_date",
    "data_interval_start",
    "data_interval_end",
    "run_after",
    "run_started_at",
    "started_at",
)


def _decode(body: bytes) -> dict[str, Any]:
    message = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError("a frame must hold one JSON object")
    return message


def _read_exactly(sock: socket.socket, count: int) -> bytes | None:
    buffer = bytearray()
    while len(buffer) < count:
        piece = sock.recv(count - len(buffer))
        if not piece:
            return None
        buffer += piece
    return bytes(buffer)

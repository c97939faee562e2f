"""What an agent keeps in memory: the connections of its task processes and the attempts they run.

None of it is truth; rows are. It is what is needed to answer, to end an attempt properly and to clean up after it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dflow.runtime.ends import EndKind, RetrySettings
from dflow.runtime.processes import ChildProcess
from dflow.runtime.protocol import FrameDecoder


@dataclass(slots=True, eq=False, kw_only=True)
class Live:
    """A claimed attempt whose end is not recorded yet."""

    ti_id: int
    attempt_id: str
    run_pk: int
    name: str  # dag_id.task_id, for people
    seed: str  # names the task instance
    bundle_hash: str
    user_failures: int
    retry: RetrySettings  # a guess until the process has loaded the DAG
    process: ChildProcess
    claimed_at: float
    timeout_seconds: float | None = None
    kill_at: float | None = None  # when its time limit and the grace have passed
    next_seq: int = 0  # of its log chunks
    peak_rss_bytes: int | None = None
    kind: EndKind | None = None  # why we are ending it
    cancelled_by: str | None = None
    died_at: float | None = None  # when we saw that its process is gone
    is_ending: bool = False  # its end is on its way to the database
    is_killed: bool = False


@dataclass(slots=True, eq=False)
class Connection:
    """A task process."""

    socket: socket.socket
    process: ChildProcess
    decoder: FrameDecoder = field(default_factory=FrameDecoder)
    outgoing: bytearray = field(default_factory=bytearray)
    backlog: int = 0  # bytes of its requests that wait for the database
    events: int = 0  # what the selector watches for
    live: Live | None = None
    is_open: bool = True


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Something to be done in the next transaction: what a task process asked (``connection``), or an end we saw."""

    op: str  # claim, hand_back, finish, died, xcom_push, xcom_pull, task_states, log
    message: Mapping[str, Any]
    connection: Connection | None = None
    live: Live | None = None
    seq: int = 0  # of the log chunk it carries
    size: int = 0  # bytes
    exit_code: int | None = None  # for died
    is_out_of_memory: bool = False  # for died
    is_repeat: bool = False  # tried before; whether it was committed is not known
    is_substitute: bool = False  # stands for an end that could not be stored

"""The connection of one task process to its agent, and the requests a task process makes over it.

One request at a time, answered in order; `started`, `log` and `finish` frames are sent and not answered. Safe for
several threads. When the agent is gone the process must not go on (nobody renews its lease): ``on_gone`` is called,
which in a task process never returns.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

from dflow.core.errors import AgentRequestError, StaleAttemptError
from dflow.core.interrupts import shielded
from dflow.runtime.protocol import LogLine, Outcome, Work, encode_frame, read_frame, work_from_json

AGENT_GONE_EXIT_CODE: Final = 76  # EX_PROTOCOL: a task process that lost its agent
RawLine = tuple[float, str, str, str]  # the fields of a LogLine, as they go over the socket and into Postgres


def exit_agent_gone() -> NoReturn:
    """End this process at once, without running anything of the task any more."""
    os._exit(AGENT_GONE_EXIT_CODE)


class AgentClient:
    """What a task process may ask of its agent; implements `dflow.runtime.protocol.AttemptClient`.

    The requests about "the attempt" mean the one this connection claimed last; the agent knows which.
    """

    def __init__(self, sock: socket.socket, *, on_gone: Callable[[], NoReturn] = exit_agent_gone) -> None:
        self.socket = sock
        self._on_gone = on_gone
        self._request_lock = threading.RLock()  # a request and its answer
        self._send_lock = threading.Lock()  # one frame
        os.register_at_fork(after_in_child=self._close_in_fork)

    @classmethod
    def connect(cls, path: str, *, on_gone: Callable[[], NoReturn] = exit_agent_gone) -> AgentClient:
        """Connect to the agent's Unix socket. An agent that is not there counts as gone."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            on_gone()
        return cls(sock, on_gone=on_gone)

    def close(self) -> None:
        """Close the connection; to the agent that is the end of this process."""
        self.socket.close()

    # --- the life of an attempt, for the child loop

    def claim(self, ti_id: int, attempt_id: str) -> tuple[Work, str | None] | None:
        """Claim an attempt. Return its work and, when it is on this machine already, the folder of its code.

        None: the attempt is not to be had (claimed, superseded, or the worker drains); drop the message.
        """
        reply = self._request({"op": "claim", "ti_id": ti_id, "attempt_id": attempt_id, "pid": os.getpid()})
        if reply["work"] is None:
            return None
        return work_from_json(reply["work"]), reply.get("bundle_path")

    def bundle_path(self, bundle_hash: str) -> str:
        """Return the folder that holds the bundle; the agent fetches it first when it must."""
        path: str = self._request({"op": "bundle", "hash": bundle_hash})["path"]
        return path

    def started(
        self,
        *,
        timeout_seconds: float | None,
        retry_delay_seconds: float,
        backoff_multiplier: float,
        max_retry_delay_seconds: float | None,
    ) -> None:
        """Tell the agent what it needs if it has to end the attempt itself; see `TaskSpec` for the meaning."""
        self._send(
            {
                "op": "started",
                "timeout": timeout_seconds,
                "retry_delay": retry_delay_seconds,
                "backoff_multiplier": backoff_multiplier,
                "max_retry_delay": max_retry_delay_seconds,
            }
        )

    def finish(self, outcome: Outcome, lines: Sequence[RawLine]) -> None:
        """Hand the end over, with the last log lines, and do not wait for its commit: see `dflow.runtime.child`.

        Raises ValueError or TypeError for a result that has no JSON form or is too large for a frame.
        """
        self._send(
            {
                "op": "finish",
                "reason": outcome.reason,
                "cause": outcome.cause,
                "retry_delay": outcome.retry_delay_seconds,
                "exit_code": outcome.exit_code,
                "peak_rss": outcome.peak_rss_bytes,
                "xcoms": dict(outcome.xcoms),
                "lines": lines,
            }
        )

    def send_lines(self, lines: Sequence[RawLine]) -> None:
        """Hand log lines over, without an answer. Blocks while the agent cannot take more."""
        if lines:
            self._send({"op": "log", "lines": lines})

    # --- AttemptClient

    def log(self, lines: Sequence[LogLine]) -> None:
        """Hand log lines over; see AttemptClient."""
        self.send_lines([(line.at, line.level, line.source, line.text) for line in lines])

    def push_xcom(self, key: str, value: Any) -> None:
        """Store a JSON value now; see AttemptClient."""
        if not self._request({"op": "xcom_push", "key": key, "value": value})["ok"]:
            raise StaleAttemptError(f"XCom {key!r} was not stored: this attempt was ended from outside")

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
        """Return stored values; see AttemptClient."""
        reply = self._request(
            {
                "op": "xcom_pull",
                "task_ids": None if task_ids is None else list(task_ids),
                "key": key,
                "map_indexes": None if map_indexes is None else list(map_indexes),
                "dag_id": dag_id,
                "run_id": run_id,
                "include_prior_dates": include_prior_dates,
            }
        )
        return [(task_id, map_index, value) for task_id, map_index, value in reply["values"]]

    def task_states(self, task_ids: Sequence[str]) -> dict[str, str]:
        """Return the states of task instances of the same run; see AttemptClient."""
        states: dict[str, str] = self._request({"op": "task_states", "task_ids": list(task_ids)})["states"]
        return states

    # --- frames

    def _request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frame = encode_frame(message)
        with shielded(), self._request_lock:
            self._send_frame(frame)
            try:
                reply = read_frame(self.socket)
            except (OSError, ValueError):
                reply = None
            if reply is None:
                self._on_gone()
        if (error := reply.get("error")) is not None:
            raise AgentRequestError(error)
        return reply

    def _send(self, message: Mapping[str, Any]) -> None:
        frame = encode_frame(message)
        with shielded():
            self._send_frame(frame)

    def _send_frame(self, frame: bytes) -> None:
        try:
            with self._send_lock:
                self.socket.sendall(frame)
        except OSError:
            self._on_gone()

    def _close_in_fork(self) -> None:
        """A process the task forks must neither speak for it nor keep the connection open after its death."""
        try:
            os.close(self.socket.detach())
        except OSError:
            pass

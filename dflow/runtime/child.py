"""The life of one nudge inside a task process, whoever the parent is (a Celery pool, a local executor's host).

    claim -> bundle -> load the DAG (warm: kept for the next attempt) -> run_attempt -> finish

A process makes one `ChildLoop` after its fork and calls `run_one` for every nudge it is given. Promises:

- Nothing of a task runs before its claim is committed. Its end is handed to the agent, which commits it together with
  whatever else is waiting, the claim of this process's next attempt for one. `run_one` does not wait for that commit:
  once an attempt is claimed its message has no further meaning (a redelivered one is refused), and the rows, not the
  broker, remember what is under way. Should the agent die before the commit, the lease brings the attempt back.
- A process whose agent is gone cannot know whether its lease still holds: it ends itself at once (`os._exit`), which
  also ends the task. It never reconnects in the middle of an attempt.
- Cancellation arrives as SIGUSR1 and raises `TaskCancelled` in the main thread, only while a task runs.
- The process has a session of its own, so a Ctrl-C in the terminal of its parent drains instead of killing tasks, and
  the agent finds what a task leaves behind by session and by the variable DFLOW_ATTEMPT_ID.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from dflow.core.errors import AgentStartError, DagImportError, DflowError
from dflow.core.interrupts import forget, interrupt
from dflow.core.retry import after_user_failure
from dflow.core.states import Reason, TaskState
from dflow.runtime.client import AgentClient, exit_agent_gone
from dflow.runtime.loader import LoadedFile, load_dags
from dflow.runtime.logs import LogCapture
from dflow.runtime.protocol import ATTEMPT_VARIABLE, SOCKET_VARIABLE, Outcome, Work
from dflow.runtime.runner import TaskCancelled, run_attempt
from dflow.settings import Settings

if TYPE_CHECKING:
    from dflow.authoring.dag import DAG

log = logging.getLogger(__name__)

CANCEL_SIGNAL: Final = signal.SIGUSR1
_LOADED_FILES: Final = 32  # DAG files kept warm in one process


class ChildLoop:
    """Runs attempts in this process, one at a time. Make it in the main thread, once, after the fork.

    It takes over file descriptors 1 and 2, the root logger and SIGUSR1 of the process for good. Raises AgentStartError
    without an agent's socket path.
    """

    def __init__(self, settings: Settings, *, socket_path: str | None = None) -> None:
        path = socket_path or os.environ.get(SOCKET_VARIABLE)
        if not path:
            raise AgentStartError(f"no agent to ask: {SOCKET_VARIABLE} is not set; start task processes by a worker")
        self._settings = settings
        self._loaded: OrderedDict[tuple[str, str], LoadedFile] = OrderedDict()
        self._is_cancellable = False
        self._directory = os.getcwd()
        _own_session()
        signal.signal(CANCEL_SIGNAL, self._on_cancel)
        self._client = AgentClient.connect(path)
        self._capture = LogCapture(
            self._client.send_lines,
            level=settings.logging.logging_level,
            flush_interval=settings.worker.log_flush_interval,
            watched=self._client.socket,
            on_gone=exit_agent_gone,
        )

    def run_one(self, ti_id: Any, attempt_id: Any) -> bool:
        """Claim and run one attempt to its recorded end; True when this process ran it.

        False: the arguments are no nudge (logged), or the attempt is not to be had: it was claimed before, superseded,
        or this worker drains. All of that is ordinary; the message has no further use.
        """
        if not is_nudge(ti_id, attempt_id):
            log.error("refused a message with the arguments %.200r: expected a task instance id and an attempt id",
                      (ti_id, attempt_id))  # fmt: skip
            return False
        claimed = self._client.claim(ti_id, attempt_id)
        if claimed is None:
            log.debug("attempt %s of task instance %s is not to be had; its message is dropped", attempt_id, ti_id)
            return False
        work, folder = claimed
        self._capture.begin()
        outcome = self._run(work, folder)
        self._finish(outcome)
        return True

    def _run(self, work: Work, folder: str | None) -> Outcome:
        os.environ[ATTEMPT_VARIABLE] = work.attempt_id
        _forget_peak_rss()
        terminate = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from outside: an end, not an exception in the task
        try:
            self._is_cancellable = True
            outcome = self._load_and_run(work, folder)
        except TaskCancelled:
            outcome = Outcome(reason=Reason.CANCELLED)
        finally:
            self._is_cancellable = False
            forget()
            signal.signal(signal.SIGTERM, terminate)
            self._tidy()
        if outcome.peak_rss_bytes is None:
            outcome = replace(outcome, peak_rss_bytes=_peak_rss_bytes())
        return outcome

    def _load_and_run(self, work: Work, folder: str | None) -> Outcome:
        try:
            loaded = self._load(work, folder or self._client.bundle_path(work.bundle_hash))
            dag = loaded.dags.get(work.dag_id)
            if dag is None:
                raise DagImportError(f"{work.path} of bundle {work.bundle_hash[:12]} has no DAG {work.dag_id!r}")
        except TaskCancelled:
            raise
        except BaseException as error:  # noqa: BLE001 user code at import may raise anything, SystemExit included
            return self._load_failed(work, error)
        self._tell_limits(dag, work)
        return run_attempt(work, dag, self._client, settings=self._settings)

    def _tell_limits(self, dag: DAG, work: Work) -> None:
        task = dag.task_dict.get(work.task_id)
        if task is None:
            return  # run_attempt says so
        core = self._settings.core
        self._client.started(
            timeout_seconds=_seconds(task.execution_timeout, core.default_task_execution_timeout),
            retry_delay_seconds=_seconds(task.retry_delay, None) or core.default_task_retry_delay,
            backoff_multiplier=task.retry_exponential_backoff,
            max_retry_delay_seconds=_seconds(task.max_retry_delay, None),
        )

    def _load(self, work: Work, folder: str) -> LoadedFile:
        key = (work.bundle_hash, work.path)
        loaded = self._loaded.get(key)
        if loaded is None:
            with _time_limit(self._settings.core.dagbag_import_timeout, f"importing {work.path}"):
                loaded = load_dags(Path(folder, work.path), bundle_root=Path(folder))
            self._loaded[key] = loaded
            if len(self._loaded) > _LOADED_FILES:
                self._loaded.popitem(last=False)
        else:
            self._loaded.move_to_end(key)
        return loaded

    def _load_failed(self, work: Work, error: BaseException) -> Outcome:
        """A failure of the user's code that happened before the task's own settings were known."""
        text = error.traceback if isinstance(error, DagImportError) and error.traceback else None
        if text is None and not isinstance(error, DflowError):
            text = "".join(traceback.format_exception(error))
        log.error("the DAG could not be loaded from its bundle: %s%s", error, f"\n{text}" if text else "")
        decision = after_user_failure(
            failures=work.user_failures + 1,
            retries=work.retries,
            delay=self._settings.core.default_task_retry_delay,
            backoff_multiplier=0,
            max_delay=None,
            seed=work.attempt_id,
        )
        return Outcome(
            reason=Reason.LOAD_FAILED,
            cause=f"could not load {work.path}: {_one_line(error)}",
            retry_delay_seconds=decision.delay_seconds if decision.to_state is TaskState.UP_FOR_RETRY else None,
        )

    def _finish(self, outcome: Outcome) -> None:
        lines = self._capture.end()
        try:
            self._client.finish(outcome, lines)
        except (ValueError, TypeError) as error:
            cause = f"the result of the task cannot be stored: {_one_line(error)}"
            self._client.finish(Outcome(reason=Reason.FAIL_RAISED, cause=cause), [])

    def _tidy(self) -> None:
        """Undo what a task may do to its warm process that the next one would trip over."""
        try:
            if os.getcwd() != self._directory:
                os.chdir(self._directory)
        except OSError:
            os.chdir("/")

    def _on_cancel(self, signum: int, frame: FrameType | None) -> None:
        if self._is_cancellable:
            interrupt(TaskCancelled("cancelled from outside"))


def is_nudge(ti_id: object, attempt_id: object) -> bool:
    """Return whether the two are what the publisher sends: a positive 64-bit integer and the text of a UUID."""
    if type(ti_id) is not int or not 0 < ti_id < 2**63 or type(attempt_id) is not str:
        return False
    try:
        return str(uuid.UUID(attempt_id)) == attempt_id
    except ValueError:
        return False


@contextmanager
def _time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise DagImportError in the block when it takes longer. Uses SIGALRM, which is nobody else's at this point."""

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        interrupt(DagImportError(f"{what} took longer than {seconds:g} s (core.dagbag_import_timeout)"))

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _seconds(value: timedelta | None, default: float | None) -> float | None:
    return default if value is None else value.total_seconds()


def _own_session() -> None:
    try:
        os.setsid()
    except OSError:
        pass  # it leads a group already


def _forget_peak_rss() -> None:
    """Start the high-water mark anew, which is kept for the life of a process (Linux: proc(5), clear_refs)."""
    try:
        with open("/proc/self/clear_refs", "wb", buffering=0) as file:
            file.write(b"5")
    except OSError:
        pass


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return (text if isinstance(error, DflowError) and text else f"{name}: {text}" if text else name)[:500]

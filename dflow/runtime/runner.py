"""One attempt, from its parameters to its outcome: resolve, render, execute, keep the result, say how it ended.

`run_attempt` is the same under every executor and in ``dag.test()``. It never raises: whatever user code does, the
answer is an `Outcome`; only a cancellation that arrives outside user code reaches the caller. The operator of the DAG
file is never changed; the attempt works on a copy. An empty Python task costs well under 300 microseconds here.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

from dflow.authoring import context as current_context
from dflow.authoring.coroutines import run_to_end
from dflow.authoring.exceptions import AirflowException, AirflowFailException, AirflowSkipException, AirflowTaskTimeout
from dflow.authoring.refusal import did_you_mean, is_user_file
from dflow.authoring.resolvable import find_xcom_args
from dflow.authoring.xcom_arg import RETURN_KEY
from dflow.core.errors import DflowError
from dflow.core.interrupts import interrupt
from dflow.core.retry import after_user_failure
from dflow.core.states import Reason, TaskState
from dflow.runtime import templates
from dflow.runtime.context import build_context, resolve_params
from dflow.runtime.protocol import Outcome
from dflow.runtime.task_instance import TaskInstance

if TYPE_CHECKING:
    from dflow.authoring.dag import DAG
    from dflow.authoring.operator import BaseOperator
    from dflow.runtime.protocol import AttemptClient, Work
    from dflow.settings import Settings

logger = logging.getLogger("dflow.task")

_MAX_CAUSE: Final = 500
_RELATIONS: Final = frozenset({"upstream_task_ids", "downstream_task_ids", "_inherited", "_taken_defaults"})


class TaskCancelled(BaseException):
    """Raised inside a task, from a signal handler, when somebody cancelled it.

    Not an `Exception`, so that ``except Exception`` in a task does not swallow it.
    """


def run_attempt(work: Work, dag: DAG, client: AttemptClient, *, settings: Settings) -> Outcome:
    """Run one attempt and return how it ended.

    Parameters:
        work: what was claimed.
        dag: the DAG as its file defines it, loaded from the bundle of the run.
        client: the attempt's way to XComs and states.
        settings: size limit of XComs, whether conf overrides params, defaults and cap of retry delays.

    ``execution_timeout`` is kept by SIGALRM, so only in the main thread; elsewhere a warning is logged. The result is
    among ``xcoms`` of the outcome, not pushed; what the task pushes itself goes to the client at once.
    """
    task = dag.task_dict.get(work.task_id)
    if task is None:
        near = did_you_mean(work.task_id, dag.task_dict)
        return Outcome(reason=Reason.LOAD_FAILED, cause=f"DAG {dag.dag_id!r} has no task {work.task_id!r}{near}")
    attempt = _Attempt(work, dag, _fresh(task), client, settings)
    with dag.code.active() if dag.code is not None else contextlib.nullcontext():
        return attempt.run()


def _fresh(task: BaseOperator) -> BaseOperator:
    """Return a copy of the operator that an attempt may change.

    Template fields are rebuilt when they are rendered. The other lists, dicts and sets of an operator of the user's are
    copied here, so that ``self.rows.append(...)`` does not pile up over the attempts of a warm process.
    """
    fresh = copy.copy(task)
    if not type(task).__module__.startswith("dflow.authoring."):
        for name, value in vars(task).items():
            if type(value) in (list, dict, set) and name not in _RELATIONS and name not in task.template_fields:
                try:
                    setattr(fresh, name, copy.deepcopy(value))
                except Exception:  # noqa: BLE001 -- holds something that cannot be copied: it is shared then
                    logger.debug("%s of %r is shared between attempts: it cannot be copied", name, task.task_id)
    return fresh


class _Attempt:
    """The attempt under way."""

    __slots__ = ("_client", "_dag", "_settings", "_task", "_ti", "_timeout", "_work")

    def __init__(self, work: Work, dag: DAG, task: BaseOperator, client: AttemptClient, settings: Settings) -> None:
        self._work, self._dag, self._task, self._client, self._settings = work, dag, task, client, settings
        self._ti = TaskInstance(work, task, client, xcom_max_bytes=settings.core.xcom_max_bytes)
        self._timeout = _timeout_seconds(task, settings)

    def run(self) -> Outcome:
        try:
            return Outcome(reason=Reason.SUCCEEDED, xcoms=self._succeed())
        except AirflowSkipException as error:
            logger.info("Skipped: %s", _first_line(error) or "the task asked for it")
            return Outcome(reason=Reason.SKIP_RAISED, cause=_cause(error))
        except AirflowFailException as error:
            _log_error("Failed, and asked not to be tried again", error)
            return Outcome(reason=Reason.FAIL_RAISED, cause=_cause(error))
        except AirflowTaskTimeout as error:
            self._kill()
            _log_error("Timed out", error)
            return self._user_failure(Reason.TIMEOUT, error)
        except TaskCancelled as error:
            self._kill()
            logger.warning("Cancelled: %s", error)
            return Outcome(reason=Reason.CANCELLED, cause=_first_line(error) or None)
        except SystemExit as error:
            code = _exit_code(error)
            logger.error("The task ended its process with exit code %s", code)
            return self._user_failure(Reason.EXITED, error, exit_code=code)
        except BaseException as error:  # noqa: BLE001 -- user code may raise anything; none of it may end the worker
            _log_error("Failed", error)
            return self._user_failure(Reason.RAISED, error)

    def _succeed(self) -> Mapping[str, Any]:
        core = self._settings.core
        params = resolve_params(self._dag, self._task, self._work, conf_overrides=core.dag_run_conf_overrides_params)
        context = build_context(self._ti, params)
        with _time_limit(self._timeout, self._task), current_context.current(context):
            self._ti.prefetch(
                arg for name in self._task.template_fields for arg in find_xcom_args(getattr(self._task, name, None))
            )
            templates.render_fields(self._task, context)
            result = self._execute(context)
        return self._xcoms(result)

    def _execute(self, context: current_context.Context) -> Any:
        task = self._task
        task.pre_execute(context)
        result = task.execute(context)
        if inspect.iscoroutine(result):
            result = run_to_end(result)
        task.post_execute(context, result)
        return result

    def _xcoms(self, result: Any) -> Mapping[str, Any]:
        task = self._task
        if result is None or not task.do_xcom_push:
            return {}
        what = f"the result of task {task.task_id!r}"
        xcoms = {RETURN_KEY: self._ti.encode_xcom(result, what)}
        if task.multiple_outputs:
            if not isinstance(result, Mapping):
                raise TypeError(f"{what} must be a dict because of multiple_outputs, not {type(result).__name__}")
            for key, value in result.items():
                if not isinstance(key, str):
                    raise TypeError(f"{what} must have strings as keys because of multiple_outputs, not {key!r}")
                xcoms[key] = self._ti.encode_xcom(value, f"{what}[{key!r}]")
        return xcoms

    def _kill(self) -> None:
        """Let the operator end what it started elsewhere."""
        try:
            self._task.on_kill()
        except Exception as error:  # noqa: BLE001 -- the attempt ends either way
            _log_error("on_kill failed", error)

    def _user_failure(self, reason: Reason, error: BaseException, exit_code: int | None = None) -> Outcome:
        work, task, core = self._work, self._task, self._settings.core
        decision = after_user_failure(
            failures=work.user_failures + 1,
            retries=work.retries,
            delay=_seconds(task.retry_delay, core.default_task_retry_delay),
            backoff_multiplier=task.retry_exponential_backoff,
            max_delay=task.max_retry_delay.total_seconds() if task.max_retry_delay else None,
            seed=f"{work.dag_id}|{work.run_id}|{work.task_id}|{work.map_index}",
            hard_cap=core.max_task_retry_delay,
        )
        is_retried = decision.to_state is TaskState.UP_FOR_RETRY
        logger.info("%s", decision.cause)
        return Outcome(
            reason=reason,
            cause=_cause(error) if exit_code is None else f"exit code {exit_code}",
            retry_delay_seconds=decision.delay_seconds if is_retried else None,
            exit_code=exit_code,
        )


def _timeout_seconds(task: BaseOperator, settings: Settings) -> float | None:
    if task.execution_timeout is not None:
        return task.execution_timeout.total_seconds()
    return settings.core.default_task_execution_timeout


def _seconds(value: timedelta | None, default: float) -> float:
    return default if value is None else value.total_seconds()


@contextlib.contextmanager
def _time_limit(seconds: float | None, task: BaseOperator) -> Iterator[None]:
    """Raise `AirflowTaskTimeout` inside the block when it takes longer than ``seconds``."""
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        logger.warning(
            "execution_timeout of %r is not enforced: the task does not run in the main thread", task.task_id
        )
        yield
        return

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        interrupt(AirflowTaskTimeout(f"took longer than execution_timeout = {timedelta(seconds=seconds)}"))

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _exit_code(error: SystemExit) -> int:
    """Return the exit code the interpreter would end with (sys.exit: None is 0, other objects are printed and 1)."""
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1


def _cause(error: BaseException) -> str:
    line = _first_line(error)
    name = type(error).__name__
    text = f"{name}: {line}" if line else name
    return text if len(text) <= _MAX_CAUSE else text[: _MAX_CAUSE - 3] + "..."


def _first_line(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 -- an exception's own __str__ may be broken
        return "(its message cannot be shown)"
    return text.strip().splitlines()[0] if text.strip() else ""


def _log_error(headline: str, error: BaseException) -> None:
    """Log an error with the user's part of its traceback; errors of dflow's own operators need none."""
    trace = _user_traceback(error.__traceback__)
    if trace is None and isinstance(error, AirflowException | DflowError | AirflowTaskTimeout):
        logger.error("%s: %s", headline, error)
    else:
        logger.error("%s: %s", headline, _cause(error), exc_info=(type(error), error, trace or error.__traceback__))


def _user_traceback(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback from the first frame of user code on, None when there is no such frame."""
    while trace is not None and not _is_user_frame(trace):
        trace = trace.tb_next
    return trace


def _is_user_frame(trace: TracebackType) -> bool:
    filename = trace.tb_frame.f_code.co_filename
    return is_user_file(filename) and not filename.startswith(_STANDARD_LIBRARY)


_STANDARD_LIBRARY: Final = os.path.dirname(os.__file__) + os.sep

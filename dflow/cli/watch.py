"""Watches one run to its end: on a terminal one line that is kept up to date, elsewhere a line for each change.

Leaves with the exit code that says how it went: 0 success, 1 failed, 124 out of time, 130 Ctrl-C. Leaving early, or a
database that goes away for a while, does nothing to the run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import typer

from dflow.cli import output
from dflow.cli.liveness import problems_of
from dflow.cli.output import Output, duration, err, note, styled_state, warn
from dflow.cli.waiting import POLL_SECONDS, Deadline, Reader, timed_out
from dflow.core.states import RunState, TaskState

if TYPE_CHECKING:
    from rich.text import Text

    from dflow.settings import Settings
    from dflow.store.engine import Store, Tx
    from dflow.store.runs import Run
    from dflow.store.tasks import TaskInstance

# Counted states are shown in the order of a task's life.
_ORDER: Final = tuple(TaskState)
_FAILED: Final = frozenset({TaskState.FAILED.value})
_STANDSTILL_SECONDS: Final = 15.0
_MOST_FAILURES_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class _View:
    run: Run
    counts: Mapping[str, int]


def watch(
    settings: Settings, store: Store, dag_id: str, run_id: str, *, timeout_seconds: float | None, form: Output
) -> None:
    """Wait for the run's end, show how it goes on standard error and how it went on standard output.

    Raises typer.Exit with the code. ``form`` is that of the result: a table means a sentence.
    """
    deadline = Deadline(timeout_seconds)
    reader = Reader(store, deadline)
    try:
        view = _follow(settings, reader, dag_id, run_id, deadline)
    except KeyboardInterrupt:
        note(
            f"\nNo longer waiting. The run goes on: `dflow runs wait {dag_id} {run_id}` waits again, "
            f"`dflow runs cancel {dag_id} {run_id}` ends it."
        )
        raise
    _tell_end(reader, view.run, form)
    raise typer.Exit(0 if view.run.state == RunState.SUCCESS else 1)


def _follow(settings: Settings, reader: Reader, dag_id: str, run_id: str, deadline: Deadline) -> _View:
    standstill = _Standstill(settings, reader)
    with _progress() as show:
        while True:
            view = reader.read(lambda tx: _read(tx, dag_id, run_id))
            show(view)
            if view.run.is_ended:
                return view
            if deadline.has_passed:
                break
            standstill.look_at(view)
            deadline.sleep(POLL_SECONDS)
    raise timed_out(
        f"The run has not ended in time ({view.run.state}); it goes on: `dflow runs wait {dag_id} {run_id}`."
    )


def _read(tx: Tx, dag_id: str, run_id: str) -> _View:
    from dflow.store import runs

    run = runs.get(tx, dag_id, run_id)
    return _View(run, runs.state_counts(tx, run.id))


class _Standstill:
    """Says why nothing moves, once, when nothing has moved for a while."""

    def __init__(self, settings: Settings, reader: Reader) -> None:
        self._settings, self._reader = settings, reader
        self._last: Any = None
        self._since = time.monotonic()
        self._told: set[str] = set()

    def look_at(self, view: _View) -> None:
        """Compare with the last look."""
        now = (view.run.state, dict(view.counts))
        if now != self._last:
            self._last, self._since = now, time.monotonic()
        elif time.monotonic() - self._since > _STANDSTILL_SECONDS:
            self._since = time.monotonic()
            for problem in self._reader.read(lambda tx: problems_of(tx, self._settings, view.run.dag_id)):
                if problem not in self._told:
                    warn(problem)
                    self._told.add(problem)


def _progress() -> AbstractContextManager[Callable[[_View], None]]:
    return _LiveLine() if sys.stderr.isatty() and not output.is_plain_terminal() else nullcontext(_Lines())


class _LiveLine(AbstractContextManager[Callable[[_View], None]]):
    """One line, updated in place, gone at the end."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(console=err(), auto_refresh=False, transient=True)

    def __enter__(self) -> Callable[[_View], None]:
        self._live.start()
        return self._show

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def _show(self, view: _View) -> None:
        self._live.update(_line(view), refresh=True)


class _Lines:
    """A line whenever the counts change."""

    def __init__(self) -> None:
        self._last: Any = None

    def __call__(self, view: _View) -> None:
        now = (view.run.state, dict(view.counts))
        if now != self._last:
            self._last = now
            err().print(_line(view), soft_wrap=True)


def _line(view: _View) -> Text:
    from rich.text import Text

    run = view.run
    line = Text.assemble(run.dag_id, " ", styled_state(run.state))
    for state in _ORDER:
        if count := view.counts.get(state.value):
            line.append(f"  {count} ").append_text(styled_state(state.value))
    return line.append(f"  {duration(_elapsed(run))}", style="dim")


def _elapsed(run: Run) -> float:
    """Seconds since the run was created, by this machine's clock while it runs."""
    end = run.ended_at.timestamp() if run.ended_at else time.time()
    return max(0.0, end - run.created_at.timestamp())


def _tell_end(reader: Reader, run: Run, form: Output) -> None:
    failed = [] if run.state == RunState.SUCCESS else reader.read(lambda tx: _failed_tasks(tx, run))
    if form is not Output.TABLE:
        output.show_record(summary(run) | {"failed_tasks": [_failure(ti, run) for ti in failed]}, form)
        return
    cause = f": {run.cause}" if run.cause else ""
    output.out().print(
        run.dag_id, run.run_id, styled_state(run.state), f"in {duration(_elapsed(run))}{cause}", soft_wrap=True
    )
    for ti in failed[:_MOST_FAILURES_SHOWN]:
        failure = _failure(ti, run)
        output.write(
            f"  {failure['task']} failed: {failure['cause'] or failure['reason']}\n    {failure['log_command']}\n"
        )
    if len(failed) > _MOST_FAILURES_SHOWN:
        output.write(f"  and {len(failed) - _MOST_FAILURES_SHOWN} more: dflow runs show {run.dag_id} {run.run_id}\n")


def summary(run: Run) -> dict[str, Any]:
    """Return what a listing says of a run."""
    return {
        "dag_id": run.dag_id,
        "run_id": run.run_id,
        "state": run.state,
        "run_type": run.run_type,
        "logical_date": run.logical_date,
        "run_after": run.run_after,
        "started_at": run.started_at,
        "ended_at": run.ended_at,
        "duration_seconds": round((run.ended_at - run.started_at).total_seconds(), 3)
        if run.started_at and run.ended_at
        else None,
        "cause": run.cause,
    }


def _failed_tasks(tx: Tx, run: Run) -> list[TaskInstance]:
    from dflow.store import tasks

    return [ti for ti in tasks.list_for_run(tx, run.id) if ti.state in _FAILED]


def _failure(ti: TaskInstance, run: Run) -> dict[str, Any]:
    mapped = f" --map-index {ti.map_index}" if ti.map_index >= 0 else ""
    return {
        "task": f"{ti.task_id}[{ti.map_index}]" if ti.map_index >= 0 else ti.task_id,
        "reason": ti.reason,
        "cause": ti.cause,
        "log_command": f"dflow tasks logs {run.dag_id} {run.run_id} {ti.task_id}{mapped}",
    }

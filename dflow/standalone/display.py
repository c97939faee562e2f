"""What the supervisor shows: messages, and below them a live table of runs and workers on a terminal.

Without a terminal the same is said in plain lines, and only when it has changed. What is shown is read from Postgres;
while that is away, the last table stays.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dflow.core.errors import StoreUnavailableError
from dflow.store import import_errors, overview
from dflow.store.engine import Store
from dflow.store.import_errors import ImportError_
from dflow.store.overview import RunLine, WorkerLine

_MOST_COMPLAINTS: Final = 3
_RUN_ID: Final = re.compile(r"(\w+?)__(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?\+00:00")
_STYLES: Final = {
    "success": "green",
    "live": "green",
    "draining": "yellow",
    "failed": "red",
    "running": "cyan",
    "queued": "yellow",
    "up_for_retry": "yellow",
    "upstream_failed": "magenta",
    "overdue": "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What there is to show at one moment."""

    runs: Sequence[RunLine] = ()
    workers: Sequence[WorkerLine] = ()
    broken: Sequence[str] = ()  # what is wrong with DAG files that could not be read, one message for each


def read(store: Store, limit: int) -> Snapshot | None:
    """Return what the database says, or None while it is away."""
    try:
        with store.begin() as tx:
            return Snapshot(
                runs=overview.recent_runs(tx, limit),
                workers=overview.live_workers(tx),
                broken=[_about(error) for error in import_errors.list_(tx)],
            )
    except StoreUnavailableError:
        return None


class Display:
    """Shows messages and snapshots on a console; a context manager, because a live table must be closed.

    A terminal may be closed and a pipe end while everything has to be stopped in good order: then nothing is shown.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._last_line = ""
        self._complaint_lines = 0

    @property
    def run_limit(self) -> int:
        """How many runs fit."""
        return max(3, min(15, self._console.height - 16 - self._complaint_lines)) if self._live else 20

    def __enter__(self) -> Self:
        if self._live:
            with self._shown_or_not():
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            with self._shown_or_not():
                self._live.stop()

    def say(self, message: str) -> None:
        """Print one message above the table."""
        with self._shown_or_not():
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def show(self, snapshot: Snapshot) -> None:
        """Replace the table, or print a line when something has changed."""
        if self._live:
            self._complaint_lines = len(_complaints(snapshot.broken))
            with self._shown_or_not():
                self._live.update(tables(snapshot), refresh=True)
            return
        line = summary(snapshot)
        if line != self._last_line:
            self._last_line = line
            self.say(line)

    @contextlib.contextmanager
    def _shown_or_not(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """Nobody looks any more. What is still buffered must not fail again, not even when Python ends."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._console.file.fileno())
            os.close(nowhere)


def summary(snapshot: Snapshot) -> str:
    """Return a snapshot in one plain line."""
    runs = _counted(run.state for run in snapshot.runs)
    busy = sum(worker.running for worker in snapshot.workers)
    slots = sum(worker.concurrency for worker in snapshot.workers)
    line = f"runs: {runs or 'none yet'}; workers: {len(snapshot.workers)} ({busy} of {slots} slots busy)"
    return "\n".join([line, *(complaint.plain for complaint in _complaints(snapshot.broken))])


def _counted(states: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for state in states:
        counts[state] = counts.get(state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def tables(snapshot: Snapshot) -> RenderableType:
    """Return a snapshot as tables: runs, workers, and what could not be read."""
    complaints = _complaints(snapshot.broken)
    parts = [Text(), _runs_table(snapshot.runs), Text(), _workers_table(snapshot.workers)]
    return Group(*parts, *([Text(), *complaints] if complaints else []))


def _about(error: ImportError_) -> str:
    """The first line of what is wrong, with the file's name in front whoever wrote it."""
    message = (error.message.splitlines() or [""])[0]
    return message if error.path in message else f"{error.path}: {message}"


def _complaints(broken: Sequence[str]) -> list[Text]:
    if not broken:
        return []
    shown = [Text(f"  {message}", overflow="ellipsis", no_wrap=True) for message in broken[:_MOST_COMPLAINTS]]
    files = "1 DAG file" if len(broken) == 1 else f"{len(broken)} DAG files"
    title = f"{files} could not be read (dflow dags list-import-errors):"
    return [Text(title, style="red", overflow="ellipsis", no_wrap=True), *shown]


def _runs_table(runs: Sequence[RunLine]) -> RenderableType:
    table = _table("Runs", "dag", "run", "state", "elapsed", "tasks", shrinking={"dag", "run", "tasks"})
    for run in runs:
        elapsed = "" if run.elapsed_seconds is None else f"{run.elapsed_seconds:.1f} s"
        table.add_row(_text(run.dag_id), _text(short(run.run_id)), _state(run.state), elapsed, _counts(run.counts))
    return table if runs else Text("No runs yet.")


def _workers_table(workers: Sequence[WorkerLine]) -> RenderableType:
    table = _table("Workers", "name", "state", "queues", "busy", shrinking={"name", "queues"})
    for one in workers:
        busy = f"{one.running} of {one.concurrency}"
        queues = _text(", ".join(one.queues))
        table.add_row(_text(one.name), _state(one.state), queues, busy)
    return table if workers else Text("No workers yet.")


def short(run_id: str) -> str:
    """Return a run id as dflow makes them for a narrow table: ``manual 2026-11-22 10:00:00``; others as they are."""
    found = _RUN_ID.fullmatch(run_id)
    return " ".join(found.groups()) if found else run_id


def _table(title: str, *columns: str, shrinking: Collection[str]) -> Table:
    """A narrow terminal takes from the shrinking columns only, whose cells are `_text`: cut, never wrapped."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for column in columns:
        table.add_column(column, no_wrap=column not in shrinking)
    return table


def _text(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))


def _counts(counts: Mapping[str, int]) -> Text:
    return Text("  ", no_wrap=True, overflow="ellipsis").join(
        Text(f"{count} {state}", style=_STYLES.get(state, "dim")) for state, count in sorted(counts.items())
    )

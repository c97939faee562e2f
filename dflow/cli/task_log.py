"""Prints the log of a task instance from its chunks, and follows it while it is being written."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from dflow.cli.output import note, write
from dflow.cli.waiting import POLL_SECONDS, Deadline, Reader
from dflow.core.states import TERMINAL

if TYPE_CHECKING:
    from dflow.store.attempts import Attempt
    from dflow.store.engine import Store, Tx
    from dflow.store.logs import Chunk, Line

_CHUNKS_AT_ONCE: Final = 200


class LogPrinter:
    """The log of one task instance. ``is_raw`` leaves out time, level and source."""

    def __init__(self, store: Store, ti_id: int, *, is_raw: bool) -> None:
        self._deadline = Deadline(None)
        self._store = store
        self._reader = Reader(store, self._deadline)
        self._ti_id = ti_id
        self._is_raw = is_raw
        self._printed: dict[str, int] = {}  # attempt id -> last chunk

    def print_try(self, try_number: int | None) -> None:
        """Print what there is of one try, the latest when None. Raises NotFoundError for a try that is not there."""
        from dflow.store import attempts

        if try_number is None:
            attempt = self._store.run(lambda tx: attempts.latest(tx, self._ti_id))
        else:
            number = try_number
            attempt = self._store.run(lambda tx: attempts.get(tx, self._ti_id, number))
        if attempt is None:
            note(f"It has not started yet ({self._store.run(self._state)}).")
            return
        self._print_new(attempt)
        if attempt.id not in self._printed:
            note("It has written nothing.")

    def follow(self, try_number: int | None) -> None:
        """Print until that try has ended; of all tries from the latest on, until the task has ended, when None."""
        from dflow.store import attempts

        shown_try = try_number or 0
        while True:
            # The state is read before the lines: whatever an attempt wrote is stored when its end is.
            state = self._reader.read(self._state)
            tries = self._reader.read(lambda tx: attempts.list_for_ti(tx, self._ti_id))
            wanted = [one for one in tries if one.try_number == try_number] if try_number else tries[-1:]
            if shown_try and not try_number:
                wanted = [one for one in tries if one.try_number >= shown_try]
            for attempt in wanted:
                if shown_try and attempt.try_number > shown_try:
                    note(f"--- try {attempt.try_number}")
                shown_try = max(shown_try, attempt.try_number)
                self._print_new(attempt)
            is_try_over = bool(try_number and wanted and wanted[0].ended_at is not None)
            if is_try_over or state in TERMINAL:
                return
            self._deadline.sleep(POLL_SECONDS)

    def _print_new(self, attempt: Attempt) -> None:
        while True:
            after = self._printed.get(attempt.id, -1)
            chunks = self._reader.read(partial(_chunks, attempt_id=attempt.id, after_seq=after))
            if not chunks:
                return
            write("".join(self._format(line) for chunk in chunks for line in chunk.lines))
            self._printed[attempt.id] = chunks[-1].seq

    def _format(self, line: Line) -> str:
        if self._is_raw:
            return f"{line.text}\n"
        at = datetime.fromtimestamp(line.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        return f"{at}Z {line.level:<7} {line.source}: {line.text}\n"

    def _state(self, tx: Tx) -> str:
        from dflow.store import tasks

        ti = tasks.get_by_id(tx, self._ti_id)
        return "removed" if ti is None else ti.state


def _chunks(tx: Tx, *, attempt_id: str, after_seq: int) -> list[Chunk]:
    from dflow.store import logs

    return logs.read(tx, attempt_id, after_seq=after_seq, limit=_CHUNKS_AT_ONCE)

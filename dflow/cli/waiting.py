"""Waiting for something in the database, patiently: while the database is away, one message and another try."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

import typer

from dflow.cli.output import note, warn
from dflow.core.errors import StoreUnavailableError

if TYPE_CHECKING:
    from dflow.store.engine import Store, Tx

T = TypeVar("T")

POLL_SECONDS: Final = 0.25
_LONGEST_PAUSE_SECONDS: Final = 3.0
TIMED_OUT_EXIT_CODE: Final = 124  # as timeout(1)


class Deadline:
    """The end of the user's patience; None seconds: there is none."""

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else time.monotonic() + seconds

    @property
    def has_passed(self) -> bool:
        """Whether the time is up."""
        return self._at is not None and time.monotonic() >= self._at

    def sleep(self, seconds: float) -> None:
        """Sleep so long, or until the deadline."""
        remaining = seconds if self._at is None else min(seconds, self._at - time.monotonic())
        time.sleep(max(0.0, remaining))


def timed_out(message: str) -> typer.Exit:
    """Say that the time is up, and return what to raise."""
    warn(message)
    return typer.Exit(TIMED_OUT_EXIT_CODE)


class Reader:
    """Reads again and again from a database that may go away for a while."""

    def __init__(self, store: Store, deadline: Deadline) -> None:
        self._store = store
        self._deadline = deadline

    def read(self, fn: Callable[[Tx], T]) -> T:
        """Return ``fn(tx)``, trying until the database answers. Raises the last error at the deadline."""
        pause, is_away = POLL_SECONDS, False
        while True:
            try:
                result = self._store.run(fn)
            except StoreUnavailableError as error:
                if self._deadline.has_passed:
                    raise
                if not is_away:
                    warn(f"{str(error).splitlines()[0]}; still trying, the run does not depend on this command.")
                is_away = True
                self._deadline.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
                continue
            if is_away:
                note("The database is back.")
            return result

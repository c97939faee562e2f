"""Interrupting a task from a signal handler without tearing what must stay whole.

A timeout or a cancellation raises in the task's main thread, between any two bytecodes. That is right inside user code
and fatal inside an exchange with the agent: half a frame on the socket, and every later frame is garbage. Blocking the
signal does not help, for the kernel then gives it to another thread and Python still runs the handler in the main one.

So handlers call `interrupt(error)`, which raises at once, or, inside `shielded()`, when the outermost shield ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_depth = 0
_pending: BaseException | None = None
_taker: Callable[[BaseException], None] | None = None


def interrupt(error: BaseException) -> None:
    """Raise ``error`` now, or at the end of the shield the main thread is in. For signal handlers only."""
    global _pending
    if _depth:
        _pending = _pending or error
        return
    if _taker is not None:
        _taker(error)
        return
    raise error


@contextmanager
def taken_by(taker: Callable[[BaseException], None]) -> Iterator[None]:
    """Give interrupts to a function, in the signal handler, while the block runs: for code that swallows them.

    The function may raise the error. Nothing changes outside of the main thread.
    """
    global _taker
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _taker = _taker, taker
    try:
        yield
    finally:
        _taker = before


@contextmanager
def shielded() -> Iterator[None]:
    """Put off interrupts until the block has ended. Only the main thread is ever interrupted; elsewhere: nothing."""
    global _depth, _pending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth and _pending is not None:
            error, _pending = _pending, None
            raise error


def forget() -> None:
    """Drop an interrupt that came too late: what it meant to end has ended."""
    global _pending
    _pending = None

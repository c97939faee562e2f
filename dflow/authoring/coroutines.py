"""Running a coroutine to its end so that a timeout or cancellation always reaches it.

An event loop catches what is raised between its callbacks, logs it and goes on: a timeout that a signal handler raises
there would be lost, and the task would wait for ever. So interrupts are raised only where a coroutine's own code runs,
and otherwise cancel the main coroutine, which then ends with the interrupt's error.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable
from typing import Any, Final

from dflow.core.interrupts import shielded, taken_by

_COROUTINE: Final = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR


def run_to_end(awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable, or raise what it raised or what interrupted it."""
    interrupted: list[BaseException] = []

    async def wait() -> Any:
        return await awaitable

    with shielded():  # half a loop could not even be closed
        runner = asyncio.Runner()
        loop = runner.get_loop()
        main = loop.create_task(wait())

    def take(error: BaseException) -> None:
        if loop.is_closed():
            raise error
        interrupted.append(error)
        is_inside = _is_inside_coroutine()
        if not is_inside or asyncio.current_task(loop) is not main:
            for task in asyncio.all_tasks(loop) if main.done() else {main}:
                loop.call_soon_threadsafe(task.cancel)
        if is_inside:
            raise error

    with taken_by(take):
        try:
            result = loop.run_until_complete(main)
        except asyncio.CancelledError:
            if not interrupted:
                raise
        finally:
            with shielded():
                runner.close()  # ends what else the coroutine started
    if interrupted:
        raise interrupted[0]
    return result


def _is_inside_coroutine() -> bool:
    """Return whether a coroutine's own code was interrupted, rather than the loop at work for or between coroutines.

    The current task does not tell: while the loop puts a task back into its queue, that task still is the current one.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not run_to_end.__code__:
        if frame.f_code.co_flags & _COROUTINE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False

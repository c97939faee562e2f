"""Setup and teardown tasks: ``@setup``, ``@teardown``, ``as_teardown`` and ``with setup >> teardown:`` blocks.

A teardown runs once its setups succeeded and everything before it is done, however that ended, and does not decide the
state of the run unless ``on_failure_fail_dagrun``. The rule itself is the planner's (``all_done_setup_success``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dflow.authoring import blocks
from dflow.authoring.node import connect_tasks, nodes
from dflow.authoring.refusal import refusal
from dflow.authoring.rules import TriggerRule

if TYPE_CHECKING:
    from dflow.authoring.operator import BaseOperator

_open: list[tuple[BaseOperator, ExitStack, list[BaseOperator]]] = []


def make_teardown(operator: BaseOperator, *, setups: Any = None, on_failure_fail_dagrun: bool | None = None) -> None:
    """Mark ``operator`` as a teardown, and ``setups`` as the setups before it."""
    if operator.trigger_rule not in (TriggerRule.ALL_SUCCESS, TriggerRule.ALL_DONE_SETUP_SUCCESS):
        raise refusal(
            f"teardown {operator.task_id!r} has trigger_rule {operator.trigger_rule!r}; a teardown's is fixed"
        )
    operator.is_teardown = True
    operator.trigger_rule = TriggerRule.ALL_DONE_SETUP_SUCCESS.value
    if on_failure_fail_dagrun is not None:
        operator.on_failure_fail_dagrun = on_failure_fail_dagrun
    for node in nodes(setups) if setups is not None else ():
        for setup_task in node.leaves:
            setup_task.is_setup = True
            connect_tasks(setup_task, operator)


def setup(function: Callable[..., Any]) -> Any:
    """Make a ``@task`` (or plain) function a setup: ``@setup def make_cluster(): ...``."""
    from dflow.authoring.task_decorator import TaskFunction, task

    wrapped = function if isinstance(function, TaskFunction) else task(function)
    return wrapped.marked(is_setup=True)


def teardown(function: Callable[..., Any] | None = None, *, on_failure_fail_dagrun: bool = False) -> Any:
    """Make a ``@task`` (or plain) function a teardown."""
    from dflow.authoring.task_decorator import TaskFunction, task

    def mark(inner: Callable[..., Any]) -> Any:
        wrapped = inner if isinstance(inner, TaskFunction) else task(inner)
        return wrapped.marked(is_teardown=True, on_failure_fail_dagrun=on_failure_fail_dagrun)

    return mark if function is None else mark(function)


def open_block(operator: BaseOperator) -> None:
    """Begin ``with setup >> teardown:``; ``operator`` is the teardown (or a setup alone)."""
    if not (operator.is_teardown or operator.is_setup):
        raise refusal(f"`with` needs a setup or teardown task; {operator.task_id!r} is neither")
    stack = ExitStack()
    made = stack.enter_context(blocks.watching())
    _open.append((operator, stack, made))


def close_block(operator: BaseOperator, *, failed: bool) -> None:
    """End the block: its setups run before the first of the tasks made inside, its teardown after the last."""
    opened, stack, made = _open.pop()
    stack.close()
    if failed:
        return
    setups, teardowns = _sides(opened)
    for task in _first(made):
        for before in setups:
            connect_tasks(before, task)
    for task in _last(made):
        for after in teardowns:
            connect_tasks(task, after)


def _sides(operator: BaseOperator) -> tuple[list[BaseOperator], list[BaseOperator]]:
    if operator.is_teardown:
        return [task for task in operator.upstream_list if task.is_setup], [operator]
    return [operator], [task for task in operator.downstream_list if task.is_teardown]


def _first(tasks: Sequence[BaseOperator]) -> list[BaseOperator]:
    inside = {task.task_id for task in tasks}
    return [task for task in tasks if not task.upstream_task_ids & inside]


def _last(tasks: Sequence[BaseOperator]) -> list[BaseOperator]:
    inside = {task.task_id for task in tasks if not task.is_teardown}
    return [task for task in tasks if not task.is_teardown and not task.downstream_task_ids & inside]

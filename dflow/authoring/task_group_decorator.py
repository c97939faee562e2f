"""``@task_group``: a function whose body makes the tasks of a group; calling it makes the group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from dflow.authoring.refusal import not_supported
from dflow.authoring.task_group import TaskGroup


class TaskGroupFunction:
    """A function decorated with ``@task_group``."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.kwargs = {"group_id": function.__name__, "add_suffix_on_collision": True, **kwargs}
        if function.__doc__ and not self.kwargs.get("tooltip"):
            self.kwargs["tooltip"] = inspect.cleandoc(function.__doc__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the group; returns what the function returns, or the group when it returns nothing (Airflow's rule)."""
        with TaskGroup(**self.kwargs) as group:
            result = self.function(*args, **kwargs)
        return group if result is None else result

    def override(self, **kwargs: Any) -> TaskGroupFunction:
        """Return the same function with other arguments for the group."""
        return TaskGroupFunction(self.function, {**self.kwargs, **kwargs})

    def expand(self, **kwargs: Any) -> Any:
        """Airflow maps the group here."""
        raise not_supported("mapped task groups (dynamic task mapping)")

    def expand_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Airflow maps the group here."""
        raise not_supported("mapped task groups (dynamic task mapping)")

    def partial(self, **kwargs: Any) -> Any:
        """Airflow begins to map the group here."""
        raise not_supported("mapped task groups (dynamic task mapping)")


def task_group(function: Callable[..., Any] | str | None = None, /, **kwargs: Any) -> Any:
    """Make a task group of a function; arguments are those of `TaskGroup`, ``group_id`` is the function's name.

    Calling it twice makes ``name`` and ``name__1``. Example: ``@task_group(tooltip="...") def load(rows): ...``
    """
    if callable(function):
        return TaskGroupFunction(function, kwargs)
    if isinstance(function, str):
        kwargs["group_id"] = function
    return functools.partial(TaskGroupFunction, kwargs=kwargs)

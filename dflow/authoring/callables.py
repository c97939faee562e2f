"""Which arguments a user's function gets: what the author passed, and what it asks for from the context by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from dflow.authoring.context import KEYS

_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def keyword_arguments(
    function: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any], context: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the keyword arguments to call ``function`` with after ``args``, and the given names it does not take.

    A function with ``**kwargs`` gets the whole context, any other only what it names (Airflow's rule). What is given
    wins over the context. Raises ValueError when a positional argument lands on the name of a context variable.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins without a signature take what they are given
        return dict(given), []
    taken_by_position = [p.name for p in parameters.values() if p.kind in _POSITIONAL][: len(args)]
    for name in taken_by_position:
        if name in context and name not in given:
            raise ValueError(
                f"argument {name!r} of {_name(function)}() is the name of a context variable and is also given by "
                "position; rename it or pass it by name"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        positional_only = {p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY}
        chosen = {name: context[name] for name in context if name not in given}
        chosen.update(given)
        for name in (*taken_by_position, *positional_only):
            chosen.pop(name, None)
        return chosen, []
    chosen = {}
    for parameter in parameters.values():
        name = parameter.name
        if name in given:
            chosen[name] = given[name]
        elif name in context and parameter.kind is not parameter.POSITIONAL_ONLY and name not in taken_by_position:
            chosen[name] = context[name]
    return chosen, [name for name in given if name not in chosen]


def check_defaults(function: Callable[..., Any]) -> None:
    """Refuse an argument named like a context variable with a default, which the task could never get (Airflow's rule).

    Raises ValueError.
    """
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in KEYS and parameter.default not in (parameter.empty, None):
            raise ValueError(
                f"argument {parameter.name!r} of {_name(function)}() is the name of a context variable; its default "
                "can only be None"
            )


def check_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check a call made in a DAG file, where context variables may be left out. Raises TypeError as the call would."""
    signature = inspect.signature(function)
    bound = signature.bind_partial(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in KEYS:
            continue
        if parameter.default is parameter.empty and parameter.name not in bound:
            raise TypeError(f"missing a required argument: {parameter.name!r}")


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))

"""``@dag``: a function whose body makes the tasks; calling it makes the DAG, its arguments become params."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from dflow.authoring import blocks
from dflow.authoring.dag import DAG
from dflow.authoring.param import UNSET, Param
from dflow.authoring.refusal import refusal


def dag(dag_id: str | Callable[..., Any] = "", /, **kwargs: Any) -> Any:
    """Make a DAG of a function: ``@dag(schedule="@daily", start_date=...)``, then call it once at the top level.

    ``dag_id`` defaults to the function's name and ``doc_md`` to its docstring; the other arguments are those of `DAG`.
    Arguments of the function become params of the DAG; inside they stand for the value in the run.
    The call returns the `DAG`. Raises `DagDefinitionError` as `DAG` does.
    """
    if callable(dag_id):
        return _wrap(dag_id, "", {})
    name = dag_id or kwargs.pop("dag_id", "")
    return functools.partial(_wrap, dag_id=name, kwargs=kwargs)


def _wrap(function: Callable[..., Any], dag_id: str, kwargs: dict[str, Any]) -> Callable[..., DAG]:
    if not callable(function):
        raise refusal("@dag is put on a function; give arguments by name: @dag(dag_id=...)")
    signature = inspect.signature(function)

    @functools.wraps(function)
    def factory(*args: Any, **call_kwargs: Any) -> DAG:
        try:
            bound = signature.bind_partial(*args, **call_kwargs)
        except TypeError as error:
            raise refusal(f"{function.__name__}(): {error}") from None
        made = DAG(dag_id or function.__name__, **_with_docs(kwargs, function))
        made.fileloc = function.__code__.co_filename
        with _without_registration(made):
            stand_ins = {}
            for name, parameter in signature.parameters.items():
                if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    raise refusal(f"the @dag function {function.__name__}() cannot take *args or **kwargs")
                default = bound.arguments.get(name, parameter.default)
                known = made.params.get_param(name) if name in made.params else None
                if default is not parameter.empty:
                    made.params[name] = default
                elif known is None:
                    made.params[name] = Param(UNSET)
                stand_ins[name] = made.param(name)
            function(**stand_ins)
        blocks.dag_made(made)
        return made

    return factory


class _without_registration:
    """The block of the DAG, reported once by the factory with the line of the call, not by the block's end."""

    def __init__(self, made: DAG) -> None:
        self._dag = made

    def __enter__(self) -> None:
        blocks.enter_dag(self._dag)

    def __exit__(self, *exc_info: object) -> None:
        blocks.leave_dag()


def _with_docs(kwargs: dict[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    if function.__doc__ and not kwargs.get("doc_md"):
        return {**kwargs, "doc_md": inspect.cleandoc(function.__doc__)}
    return kwargs

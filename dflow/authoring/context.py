"""The context of a running task: a read-mostly mapping with lazy values, and ``get_current_context()``.

This file knows the names and the mechanics; `dflow.runtime.context` fills in the values of an attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from dflow.authoring.exceptions import AirflowException
from dflow.authoring.refusal import did_you_mean

# What a @task function may name as an argument and get from the context without the caller passing it.
KEYS: Final = frozenset(
    {
        "conf",
        "conn",
        "dag",
        "dag_run",
        "data_interval_end",
        "data_interval_start",
        "ds",
        "ds_nodash",
        "exception",
        "expanded_ti_count",
        "inlet_events",
        "inlets",
        "logical_date",
        "macros",
        "map_index",
        "map_index_template",
        "outlet_events",
        "outlets",
        "params",
        "prev_data_interval_end_success",
        "prev_data_interval_start_success",
        "prev_end_date_success",
        "prev_start_date_success",
        "reason",
        "run_id",
        "task",
        "task_instance",
        "task_instance_key_str",
        "templates_dict",
        "test_mode",
        "ti",
        "triggering_asset_events",
        "try_number",
        "ts",
        "ts_nodash",
        "ts_nodash_with_tz",
        "var",
    }
)

_GONE: Final = {
    "execution_date": "it was removed in Airflow 3; use logical_date",
    "next_execution_date": "it was removed in Airflow 3; use data_interval_end",
    "prev_execution_date": "it was removed in Airflow 3; use data_interval_start",
    "next_ds": "it was removed in Airflow 3; use {{ data_interval_end | ds }}",
    "next_ds_nodash": "it was removed in Airflow 3; use {{ data_interval_end | ds_nodash }}",
    "prev_ds": "it was removed in Airflow 3; use {{ data_interval_start | ds }}",
    "prev_ds_nodash": "it was removed in Airflow 3; use {{ data_interval_start | ds_nodash }}",
    "yesterday_ds": "it was removed in Airflow 3; use {{ macros.ds_add(ds, -1) }}",
    "tomorrow_ds": "it was removed in Airflow 3; use {{ macros.ds_add(ds, 1) }}",
}


class ContextKeyError(KeyError):
    """The context has no such key; the message says why."""

    def __str__(self) -> str:
        return str(self.args[0])


class Context(MutableMapping[str, Any]):
    """The variables of a running task, by name. Values are computed when they are first read.

    ``absent`` maps names that this run does not have to the reason; reading one raises with that reason.
    """

    __slots__ = ("_absent", "_lazy", "_values")

    def __init__(
        self,
        values: dict[str, Any],
        lazy: Mapping[str, Callable[[Context], Any]] | None = None,
        absent: Mapping[str, str] | None = None,
    ) -> None:
        self._values = values
        self._lazy: Mapping[str, Callable[[Context], Any]] = lazy or {}
        self._absent: Mapping[str, str] = absent or {}

    def __getitem__(self, key: str) -> Any:
        try:
            return self._values[key]
        except KeyError:
            pass
        if key in self._absent or key not in self._lazy:
            raise ContextKeyError(self.why_absent(key))
        value = self._values[key] = self._lazy[key](self)
        return value

    def why_absent(self, key: str) -> str:
        """Return the sentence that says why ``key`` is not there."""
        reason = self._absent.get(key) or _GONE.get(key)
        return f"the context has no {key!r}" + (f": {reason}" if reason else did_you_mean(key, self))

    def computed(self) -> dict[str, Any]:
        """Return the variables that were computed so far."""
        return dict(self._values)

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise ContextKeyError(self.why_absent(key))
        self._values.pop(key, None)
        self._absent = {**self._absent, key: "it was deleted"}

    def __contains__(self, key: object) -> bool:
        return key in self._values or (key in self._lazy and key not in self._absent)

    def __iter__(self) -> Iterator[str]:
        yield from self._values
        for key in self._lazy:
            if key not in self._values and key not in self._absent:
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<Context of {self._values.get('ti')!r}>"


_current: ContextVar[Context] = ContextVar("dflow_current_context")


def get_current_context() -> Context:
    """Return the context of the task that is running, from anywhere in its code.

    Raises `AirflowException` outside a running task, e.g. at the top level of a DAG file.
    """
    try:
        return _current.get()
    except LookupError:
        raise AirflowException(
            "get_current_context() works only while a task runs; you are at the top level of a DAG file or in a "
            "thread of your own (run it there with contextvars.copy_context())"
        ) from None


@contextmanager
def current(context: Context) -> Iterator[None]:
    """Make ``context`` what get_current_context() returns inside the block."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)

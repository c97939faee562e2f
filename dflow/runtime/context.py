"""The context of one attempt: the values behind the names that templates and task functions use.

Everything but ``ti`` and ``params`` is computed when it is first read; a task that asks for nothing pays for nothing.
Names and meaning are Airflow 3's. A run without logical date has no ``ds``, ``ts``, ``logical_date`` and the like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

from dflow.authoring.context import Context
from dflow.authoring.exceptions import AirflowException
from dflow.authoring.param import resolve
from dflow.runtime import macros
from dflow.runtime.task_instance import TaskInstance, run_info

if TYPE_CHECKING:
    from dflow.authoring.dag import DAG
    from dflow.authoring.operator import BaseOperator
    from dflow.runtime.protocol import Work

_NO_DATE: Final = "this run has no logical date; use dag_run.run_after, or trigger it with a logical date"
_NO_INTERVAL: Final = "this run has no data interval; use dag_run.run_after"
_LATER: Final = "not supported yet"
_DATED: Final = (
    "logical_date", "ds", "ds_nodash", "ts", "ts_nodash", "ts_nodash_with_tz", "task_instance_key_str",
)  # fmt: skip
_ABSENT: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            "prev_data_interval_start_success", "prev_data_interval_end_success", "prev_start_date_success",
            "prev_end_date_success", "inlet_events", "outlet_events", "triggering_asset_events", "task_state_store",
            "asset_state_store", "partition_key", "partition_date", "task_reschedule_count",
        ),
        _LATER,
    ),
    "exception": "it exists only in callbacks",
    "reason": "it exists only in callbacks",
}  # fmt: skip
_ABSENT_UNDATED: Final = {**_ABSENT, **dict.fromkeys(_DATED, _NO_DATE)}


def _ti(context: Context) -> TaskInstance:
    ti: TaskInstance = context["ti"]
    return ti


def _dated(function: Callable[[datetime], Any]) -> Callable[[Context], Any]:
    return lambda context: function(context["logical_date"])


class _Later:
    """Stands for ``var`` and ``conn``, so that reading from them says what is the matter."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AirflowException(f"{_LATER}: {self._what} in templates and the context")

    def __repr__(self) -> str:
        return f"<{self._what}: {_LATER}>"


_LAZY: Final[dict[str, Callable[[Context], Any]]] = {
    "task_instance": lambda context: context["ti"],
    "task": lambda context: _ti(context).task,
    "dag": lambda context: _ti(context).task.dag,
    "dag_run": lambda context: run_info(_ti(context)._work),
    "run_id": lambda context: _ti(context).run_id,
    "try_number": lambda context: _ti(context).try_number,
    "map_index": lambda context: _ti(context).map_index,
    "map_index_template": lambda context: None,
    "expanded_ti_count": lambda context: None,
    "conf": lambda context: context["dag_run"].conf,
    "data_interval_start": lambda context: _ti(context)._work.data_interval_start,
    "data_interval_end": lambda context: _ti(context)._work.data_interval_end,
    "logical_date": lambda context: _ti(context)._work.logical_date,
    "ds": _dated(macros.ds),
    "ds_nodash": _dated(macros.ds_nodash),
    "ts": _dated(macros.ts),
    "ts_nodash": _dated(macros.ts_nodash),
    "ts_nodash_with_tz": _dated(macros.ts_nodash_with_tz),
    "task_instance_key_str": lambda context: (
        f"{_ti(context).dag_id}__{_ti(context).task_id}__{macros.ds_nodash(context['logical_date'])}"
    ),
    "macros": lambda context: macros.MACROS,
    "inlets": lambda context: [],
    "outlets": lambda context: [],
    "templates_dict": lambda context: None,
    "test_mode": lambda context: False,
    "var": lambda context: _Later("Variables"),
    "conn": lambda context: _Later("Connections"),
}


def build_context(ti: TaskInstance, params: dict[str, Any]) -> Context:
    """Return the context of an attempt."""
    absent = _ABSENT if ti._work.logical_date is not None else _ABSENT_UNDATED
    ti._context = Context({"ti": ti, "params": params}, _LAZY, absent)
    return ti._context


def resolve_params(dag: DAG, task: BaseOperator, work: Work, *, conf_overrides: bool) -> dict[str, Any]:
    """Return the params of an attempt: the DAG's, over them the task's, over them the run's conf if that is allowed.

    ``conf_overrides`` is the setting ``core.dag_run_conf_overrides_params``. Raises `ParamValidationError`.
    """
    if not dag.params and not task.params:
        return dict(work.conf) if conf_overrides else {}
    return resolve({**dag.params.dump(), **task.params.dump()}, work.conf if conf_overrides else None)

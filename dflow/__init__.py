"""dflow: a distributed, Celery-based execution backend for DAGs.

This module offers the names DAG files import, with the meaning they have in ``airflow.sdk``. Importing it does no work:
each name is looked up in its own module when it is first used, so that ``import dflow`` costs next to nothing in the
processes (CLI, scheduler, worker parent) that never see a DAG file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dflow.authoring.context import Context, get_current_context
    from dflow.authoring.dag import DAG
    from dflow.authoring.dag_decorator import dag
    from dflow.authoring.edges import EdgeModifier, Label, chain, chain_linear, cross_downstream
    from dflow.authoring.exceptions import (
        AirflowException,
        AirflowFailException,
        AirflowSkipException,
        AirflowTaskTimeout,
        ParamValidationError,
        XComNotFound,
    )
    from dflow.authoring.literal import literal
    from dflow.authoring.operator import BaseOperator
    from dflow.authoring.operators.bash import BashOperator
    from dflow.authoring.operators.empty import EmptyOperator
    from dflow.authoring.operators.python import PythonOperator
    from dflow.authoring.param import Param, ParamsDict
    from dflow.authoring.rules import TriggerRule, WeightRule
    from dflow.authoring.schedule import CronTriggerTimetable, DeltaTriggerTimetable
    from dflow.authoring.setup_teardown import setup, teardown
    from dflow.authoring.task_decorator import task
    from dflow.authoring.task_group import TaskGroup
    from dflow.authoring.task_group_decorator import task_group
    from dflow.authoring.xcom_arg import XComArg

_HOMES = {
    "DAG": "authoring.dag",
    "AirflowException": "authoring.exceptions",
    "AirflowFailException": "authoring.exceptions",
    "AirflowSkipException": "authoring.exceptions",
    "AirflowTaskTimeout": "authoring.exceptions",
    "BaseOperator": "authoring.operator",
    "BashOperator": "authoring.operators.bash",
    "Context": "authoring.context",
    "CronTriggerTimetable": "authoring.schedule",
    "DeltaTriggerTimetable": "authoring.schedule",
    "EdgeModifier": "authoring.edges",
    "EmptyOperator": "authoring.operators.empty",
    "Label": "authoring.edges",
    "Param": "authoring.param",
    "ParamValidationError": "authoring.exceptions",
    "ParamsDict": "authoring.param",
    "PythonOperator": "authoring.operators.python",
    "TaskGroup": "authoring.task_group",
    "TriggerRule": "authoring.rules",
    "WeightRule": "authoring.rules",
    "XComArg": "authoring.xcom_arg",
    "XComNotFound": "authoring.exceptions",
    "chain": "authoring.edges",
    "chain_linear": "authoring.edges",
    "cross_downstream": "authoring.edges",
    "dag": "authoring.dag_decorator",
    "get_current_context": "authoring.context",
    "literal": "authoring.literal",
    "setup": "authoring.setup_teardown",
    "task": "authoring.task_decorator",
    "task_group": "authoring.task_group_decorator",
    "teardown": "authoring.setup_teardown",
}

__all__ = [  # noqa: RUF022 -- sorted as people look for them: case apart, as in _HOMES
    "AirflowException",
    "AirflowFailException",
    "AirflowSkipException",
    "AirflowTaskTimeout",
    "BaseOperator",
    "BashOperator",
    "Context",
    "CronTriggerTimetable",
    "DAG",
    "DeltaTriggerTimetable",
    "EdgeModifier",
    "EmptyOperator",
    "Label",
    "Param",
    "ParamValidationError",
    "ParamsDict",
    "PythonOperator",
    "TaskGroup",
    "TriggerRule",
    "WeightRule",
    "XComArg",
    "XComNotFound",
    "__version__",
    "chain",
    "chain_linear",
    "cross_downstream",
    "dag",
    "get_current_context",
    "literal",
    "setup",
    "task",
    "task_group",
    "teardown",
]

# Names of ``airflow.sdk`` that dflow does not have: importing one says so, instead of "cannot import name".
_NOT_YET = frozenset(
    {
        "Asset",
        "AssetAlias",
        "AssetAll",
        "AssetAny",
        "AssetOrTimeSchedule",
        "AssetWatcher",
        "BaseAsyncOperator",
        "BaseBranchOperator",
        "BaseHook",
        "BaseNotifier",
        "BaseSensorOperator",
        "BranchPythonOperator",
        "Connection",
        "CronDataIntervalTimetable",
        "DeadlineAlert",
        "DeadlineReference",
        "DeltaDataIntervalTimetable",
        "EventsTimetable",
        "LatestOnlyOperator",
        "Metadata",
        "MultipleCronTriggerTimetable",
        "ObjectStoragePath",
        "PokeReturnValue",
        "RetryPolicy",
        "ShortCircuitOperator",
        "TriggerDagRunOperator",
        "Variable",
        "asset",
    }
)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        if name in _NOT_YET:
            from dflow.authoring.refusal import not_supported

            raise not_supported(f"dflow.{name}")
        raise AttributeError(f"module 'dflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dflow.{home}"), name)
    globals()[name] = value  # the next look-up is a plain one
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

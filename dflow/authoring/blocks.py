"""Which ``with`` block we are in: the DAG, task group and setup/teardown pair that new operators join.

Parsing a file is single-threaded; these stacks belong to it. They are also where the loader hears of DAGs that were
made but not kept in a variable of the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dflow.authoring.refusal import module_location

if TYPE_CHECKING:
    from dflow.authoring.dag import DAG
    from dflow.authoring.operator import BaseOperator
    from dflow.authoring.task_group import TaskGroup

_dags: list[DAG] = []
_groups: list[TaskGroup] = []
_watchers: list[list[BaseOperator]] = []  # one list per open setup/teardown block, of the operators made inside
_made: list[tuple[DAG, str]] | None = None  # (DAG, file whose import made it), while a loader listens


def enter_dag(dag: DAG) -> None:
    """Open the block of a DAG."""
    _dags.append(dag)
    _groups.append(dag.task_group)


def leave_dag() -> None:
    """Close the block of the innermost DAG."""
    _dags.pop()
    _groups.pop()


def current_dag() -> DAG | None:
    """Return the DAG whose block we are in."""
    return _dags[-1] if _dags else None


def enter_group(group: TaskGroup) -> None:
    """Open the block of a task group."""
    _groups.append(group)


def leave_group() -> None:
    """Close the block of the innermost group."""
    _groups.pop()


def current_group(dag: DAG | None) -> TaskGroup | None:
    """Return the group whose block we are in, if it belongs to ``dag``; else the root group of ``dag``."""
    if dag is None:
        return None
    if _groups and _groups[-1].dag is dag:
        return _groups[-1]
    return dag.task_group


def operator_made(operator: BaseOperator) -> None:
    """Tell the open setup/teardown blocks of a new operator."""
    for watcher in _watchers:
        watcher.append(operator)


@contextmanager
def watching() -> Iterator[list[BaseOperator]]:
    """Collect the operators made inside the block."""
    made: list[BaseOperator] = []
    _watchers.append(made)
    try:
        yield made
    finally:
        _watchers.remove(made)


def dag_made(dag: DAG) -> None:
    """Report a DAG whose ``with`` block or @dag call is complete to the listening loader, if there is one."""
    if _made is not None and dag.auto_register:
        where = module_location()
        _made.append((dag, where.file if where else ""))


@contextmanager
def listening() -> Iterator[list[tuple[DAG, str]]]:
    """Collect the DAGs made while a file is imported, starting from no open block; restores what was open before."""
    global _made
    before = (_made, _dags[:], _groups[:], _watchers[:])
    _made, _dags[:], _groups[:], _watchers[:] = [], [], [], []
    try:
        yield _made
    finally:
        _made, _dags[:], _groups[:], _watchers[:] = before

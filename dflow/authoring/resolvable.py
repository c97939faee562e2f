"""Values that stand for something known only while the task runs: another task's result, a DAG argument, a literal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dflow.authoring.context import Context
    from dflow.authoring.operator import BaseOperator
    from dflow.authoring.xcom_arg import XComArg


class Resolvable(ABC):
    """A stand-in in an operator's argument; rendering replaces it by ``resolve(context)``."""

    __slots__ = ()

    @abstractmethod
    def resolve(self, context: Context) -> Any:
        """Return the value in the attempt that ``context`` describes."""

    def xcom_args(self) -> Iterator[XComArg]:
        """Yield the results of other tasks this value is made of."""
        return iter(())


def find_xcom_args(value: object) -> Iterator[XComArg]:
    """Yield every result of another task inside ``value``, looking into lists, tuples, sets, dicts and nested objects.

    Objects are looked into when they declare ``template_fields``, as rendering does (Airflow's rule).
    """
    if isinstance(value, Resolvable):
        yield from value.xcom_args()
    elif isinstance(value, str):
        return
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from find_xcom_args(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_xcom_args(item)
    elif hasattr(value, "template_fields") and not is_operator(value):
        for name in value.template_fields:
            yield from find_xcom_args(getattr(value, name, None))


def is_operator(value: object) -> bool:
    """Return whether ``value`` is an operator, or an operator class."""
    from dflow.authoring.operator import BaseOperator

    return isinstance(value, BaseOperator) or (isinstance(value, type) and issubclass(value, BaseOperator))


def producers(value: object) -> set[BaseOperator]:
    """Return the operators whose results ``value`` is made of."""
    return {arg.operator for arg in find_xcom_args(value)}

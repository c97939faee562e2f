"""The result of a task, as a value: pass it to another task and the two are connected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from dflow.authoring.node import Node
from dflow.authoring.refusal import not_supported, refusal
from dflow.authoring.resolvable import Resolvable

if TYPE_CHECKING:
    from dflow.authoring.context import Context
    from dflow.authoring.operator import BaseOperator

RETURN_KEY: Final = "return_value"


class XComArg(Resolvable, Node):
    """What ``operator`` pushes under ``key``, by default what it returns.

    Made by calling a ``@task`` function, by ``operator.output`` or ``XComArg(operator)``; ``result["key"]`` is another
    key of the same task (with ``multiple_outputs``). In a string it becomes a template that pulls the value.
    """

    __slots__ = ("key", "operator")

    def __init__(self, operator: BaseOperator, key: str = RETURN_KEY) -> None:
        if not isinstance(key, str):
            raise refusal(f"the key of an XCom must be a string, not {type(key).__name__} {key!r}")
        self.operator = operator
        self.key = key

    @property
    def roots(self) -> Sequence[BaseOperator]:
        """The task itself."""
        return self.operator.roots

    @property
    def leaves(self) -> Sequence[BaseOperator]:
        """The task itself."""
        return self.operator.leaves

    def xcom_args(self) -> Iterator[XComArg]:
        """Yield itself."""
        yield self

    def resolve(self, context: Context) -> Any:
        """Pull the value; None when the task returned nothing or was skipped.

        Raises `XComNotFound` for a key other than the return value that was not pushed.
        """
        return context["ti"].resolve_xcom_arg(self)

    def __getitem__(self, key: str) -> XComArg:
        if not isinstance(key, str):
            raise refusal(
                f"a task result takes only string keys at parse time, got {key!r}; take items inside the next task"
            )
        return XComArg(self.operator, key)

    def __iter__(self) -> Iterator[Any]:
        raise refusal(
            f"the result of task {self.operator.task_id!r} is not known while the file is parsed and cannot be "
            "iterated or unpacked here; do it inside a task, or use @task(multiple_outputs=True) and result['key']"
        )

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, XComArg) and other.operator is self.operator and other.key == self.key

    def __hash__(self) -> int:
        return hash((id(self.operator), self.key))

    def __repr__(self) -> str:
        suffix = "" if self.key == RETURN_KEY else f"[{self.key!r}]"
        return f"XComArg({self.operator.task_id}){suffix}"

    def __str__(self) -> str:
        key = "" if self.key == RETURN_KEY else f", key={self.key!r}"
        where = f"task_ids={self.operator.task_id!r}, dag_id={self.operator.dag_id!r}{key}"
        return f"{{{{ task_instance.xcom_pull({where}) }}}}"

    def map(self, f: Any) -> Any:
        """Airflow maps over the elements here."""
        raise not_supported("XComArg.map() (dynamic task mapping)")

    def zip(self, *others: Any, fillvalue: Any = None) -> Any:
        """Airflow zips the elements here."""
        raise not_supported("XComArg.zip() (dynamic task mapping)")

    def concat(self, *others: Any) -> Any:
        """Airflow joins the elements here."""
        raise not_supported("XComArg.concat() (dynamic task mapping)")

    def as_setup(self) -> XComArg:
        """Mark the task as a setup; see `BaseOperator.as_setup`."""
        self.operator.as_setup()
        return self

    def as_teardown(self, *, setups: Any = None, on_failure_fail_dagrun: bool | None = None) -> XComArg:
        """Mark the task as a teardown; see `BaseOperator.as_teardown`."""
        self.operator.as_teardown(setups=setups, on_failure_fail_dagrun=on_failure_fail_dagrun)
        return self

    def __enter__(self) -> XComArg:
        self.operator.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.operator.__exit__(*exc_info)

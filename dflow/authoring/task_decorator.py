"""``@task``: a function becomes a task when it is called in a DAG; its result is an `XComArg`.

``@task.bash`` makes a BashOperator of a function that returns the script. The other decorators of Airflow are refused.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, get_origin

from dflow.authoring import blocks
from dflow.authoring.callables import check_call, check_defaults
from dflow.authoring.exceptions import AirflowException
from dflow.authoring.operator import RENAMED, BaseOperator, argument_names
from dflow.authoring.operators.bash import BashOperator
from dflow.authoring.operators.python import PythonOperator
from dflow.authoring.refusal import not_supported, refusal, unknown_arguments
from dflow.authoring.setup_teardown import make_teardown
from dflow.authoring.xcom_arg import XComArg

if TYPE_CHECKING:
    from dflow.authoring.context import Context

logger = logging.getLogger(__name__)

_LATER: Final = frozenset(
    {
        "branch",
        "branch_virtualenv",
        "branch_external_python",
        "short_circuit",
        "virtualenv",
        "external_python",
        "sensor",
        "stub",
        "docker",
        "kubernetes",
        "kubernetes_cmd",
        "pyspark",
        "run_if",
        "skip_if",
    }
)
_MAPPING_TEXT = re.compile(r"\s*['\"]?(typing\.|t\.|collections\.abc\.)?(dict|Dict|Mapping|MutableMapping)\b")


class DecoratedPythonOperator(PythonOperator):
    """The task a ``@task`` function makes."""

    custom_operator_name = "@task"


class DecoratedBashOperator(PythonOperator):
    """The task a ``@task.bash`` function makes: the function returns the script."""

    custom_operator_name = "@task.bash"
    ui_color = BashOperator.ui_color

    def __init__(
        self,
        *,
        env: Mapping[str, str] | None = None,
        append_env: bool = False,
        output_encoding: str = "utf-8",
        skip_on_exit_code: Any = 99,
        cwd: str | None = None,
        output_processor: Callable[[str], Any] = lambda line: line,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.env, self.cwd = env, cwd
        self._bash = {
            "append_env": append_env,
            "output_encoding": output_encoding,
            "skip_on_exit_code": skip_on_exit_code,
            "output_processor": output_processor,
        }
        self._running: BashOperator | None = None

    template_fields = (*PythonOperator.template_fields, "env", "cwd")

    def execute(self, context: Context) -> Any:
        """Call the function for the script, render it and run it."""
        script = self.call(context)
        if not isinstance(script, str) or not script.strip():
            raise AirflowException(
                f"the @task.bash function {self._function_name()}() must return a script as a string, not empty; "
                f"it returned {script!r}"
            )
        script = context["ti"].render(script, template_ext=BashOperator.template_ext)
        with _outside_any_dag():
            self._running = BashOperator(
                task_id=self.label,
                bash_command=script,
                env=self.env,
                cwd=self.cwd,
                logger_name=self.log.name,
                **self._bash,
            )
        return self._running.execute(context)

    def on_kill(self) -> None:
        """End the script."""
        if self._running is not None:
            self._running.on_kill()


def _outside_any_dag() -> Any:
    return blocks.listening()


class TaskFunction:
    """A function decorated with ``@task``; call it inside a DAG."""

    def __init__(
        self, function: Callable[..., Any], operator_class: type[PythonOperator], kwargs: dict[str, Any]
    ) -> None:
        if not callable(function) or inspect.isclass(function):
            raise refusal(f"@task is put on a function, not {function!r}; give arguments by name: @task(task_id=...)")
        if isinstance(function, TaskFunction):
            raise refusal(f"@task is put on {function!r} twice")
        functools.update_wrapper(self, function)
        self.function = function
        self.operator_class = operator_class
        self.kwargs = dict(kwargs)
        self._marks: dict[str, Any] = {}
        if self.kwargs.get("multiple_outputs") is None:
            self.kwargs["multiple_outputs"] = returns_mapping(function)
        try:
            check_defaults(function)
        except ValueError as error:
            raise refusal(str(error)) from None

    def __call__(self, *args: Any, **kwargs: Any) -> XComArg:
        """Make the task with these arguments, which may be results of other tasks; returns its result."""
        name = getattr(self.function, "__name__", "task")
        try:
            check_call(self.function, args, kwargs)
        except TypeError as error:
            raise refusal(f"{name}(): {error}") from None
        operator = self.operator_class(
            python_callable=self.function, op_args=args, op_kwargs=kwargs, **self._operator_arguments(name)
        )
        if self._marks.get("is_setup"):
            operator.as_setup()
        if self._marks.get("is_teardown"):
            make_teardown(operator, on_failure_fail_dagrun=self._marks["on_failure_fail_dagrun"])
        return XComArg(operator)

    def _operator_arguments(self, name: str) -> dict[str, Any]:
        arguments = dict(self.kwargs)
        task_group = arguments.get("task_group")
        dag = arguments.get("dag") or (task_group.dag if task_group is not None else blocks.current_dag())
        label = arguments.pop("task_id", None) or name
        if dag is not None and isinstance(label, str):
            label = dag.free_task_id(label, task_group or blocks.current_group(dag))
        if "doc_md" not in arguments and self.function.__doc__:
            arguments["doc_md"] = inspect.cleandoc(self.function.__doc__)
        return {"task_id": label, **arguments}

    def override(self, **kwargs: Any) -> TaskFunction:
        """Return the same function with other arguments for the operator: ``f.override(retries=3)(x)``."""
        _check_arguments("override()", self.operator_class, kwargs)
        other = TaskFunction(self.function, self.operator_class, {**self.kwargs, **kwargs})
        other._marks = dict(self._marks)
        return other

    def marked(self, **marks: Any) -> TaskFunction:
        """Return the same function as a setup or teardown."""
        other = self.override()
        other._marks = marks
        return other

    def partial(self, **kwargs: Any) -> Any:
        """Airflow begins to map the task here."""
        raise not_supported("partial() (dynamic task mapping)")

    def expand(self, **kwargs: Any) -> Any:
        """Airflow maps the task here."""
        raise not_supported("expand() (dynamic task mapping)")

    def expand_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Airflow maps the task here."""
        raise not_supported("expand_kwargs() (dynamic task mapping)")

    def __repr__(self) -> str:
        return f"<@task {getattr(self.function, '__qualname__', self.function)!s}>"


class TaskDecorators:
    """``@task``, ``@task(...)``, ``@task.python`` and ``@task.bash``."""

    def __call__(self, python_callable: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Make a task of a Python function; arguments are those of `PythonOperator`; ``task_id`` is its name.

        ``multiple_outputs=True`` keeps each key of the returned dict as an XCom of its own, so that ``result["key"]``
        can be passed on; it is the default for functions annotated to return a dict (Airflow's rule). A function called
        twice makes ``name`` and ``name__1``.
        """
        return _decorate(python_callable, DecoratedPythonOperator, kwargs)

    python = __call__

    def bash(self, python_callable: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Make a task of a function that returns a bash script; arguments are those of `BashOperator`."""
        return _decorate(python_callable, DecoratedBashOperator, {"multiple_outputs": False, **kwargs})

    def __getattr__(self, name: str) -> Any:
        if name in _LATER:
            raise not_supported(f"@task.{name}")
        raise AttributeError(f"@task has no {name!r}")


def _decorate(function: Callable[..., Any] | None, operator_class: type[PythonOperator], kwargs: dict[str, Any]) -> Any:
    for name in ("python_callable", "op_args", "op_kwargs"):
        if name in kwargs:
            raise refusal(f"@task takes no argument {name!r}: call the decorated function with the arguments")
    _check_arguments("@task", operator_class, kwargs)
    if function is not None:
        return TaskFunction(function, operator_class, kwargs)
    return functools.partial(TaskFunction, operator_class=operator_class, kwargs=kwargs)


def _check_arguments(owner: str, operator_class: type[PythonOperator], kwargs: Mapping[str, Any]) -> None:
    """Refuse what the operator would refuse later, where it stands: the task is made in another line."""
    known = _argument_names(operator_class)
    if unknown := [name for name in kwargs if name not in known]:
        raise unknown_arguments(owner, unknown, known, RENAMED)


@functools.cache
def _argument_names(operator_class: type[PythonOperator]) -> Collection[str]:
    return argument_names(operator_class)


task = TaskDecorators()


def returns_mapping(function: Callable[..., Any]) -> bool:
    """Return whether a function is annotated to return a dict or other mapping, without evaluating more than needed."""
    annotation = getattr(function, "__annotations__", {}).get("return")
    if isinstance(annotation, str):
        if _MAPPING_TEXT.match(annotation):
            return True
        try:
            annotation = eval(annotation, getattr(function, "__globals__", {}))  # noqa: S307 -- the user's own annotation
        except Exception:  # noqa: BLE001 -- names that exist only for type checkers
            return False
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, Mapping)


def operator_of(value: Any) -> BaseOperator | None:
    """Return the operator behind a task result or an operator itself."""
    if isinstance(value, XComArg):
        return value.operator
    return value if isinstance(value, BaseOperator) else None

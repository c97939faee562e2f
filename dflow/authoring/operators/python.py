"""PythonOperator: a task that calls a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dflow.authoring.callables import keyword_arguments
from dflow.authoring.coroutines import run_to_end
from dflow.authoring.operator import BaseOperator
from dflow.authoring.refusal import refusal

if TYPE_CHECKING:
    from dflow.authoring.context import Context

_SHOWN: Final = 500  # characters of the result that the log shows


class PythonOperator(BaseOperator):
    """Calls ``python_callable`` and keeps what it returns as the XCom ``return_value``.

    Parameters (Airflow's):
        python_callable: the function; a coroutine function is run to its end.
        op_args, op_kwargs: its arguments; templates and task results inside are resolved.
        templates_dict: more values to render; the function finds them as ``templates_dict`` of the context.
        templates_exts: endings of strings that are paths of template files.
        show_return_value_in_logs: whether the result is logged.

    The function also gets each context variable it names, or all of them with ``**kwargs``.
    """

    template_fields: Sequence[str] = ("templates_dict", "op_args", "op_kwargs")
    template_fields_renderers = {"templates_dict": "json", "op_args": "py", "op_kwargs": "py"}
    ui_color = "#ffefeb"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        templates_dict: dict[str, Any] | None = None,
        templates_exts: Sequence[str] | None = None,
        show_return_value_in_logs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not callable(python_callable):
            raise refusal(
                f"python_callable of {self.task_id!r} must be a function, not {type(python_callable).__name__}; "
                "write its name without calling it"
            )
        self.python_callable = python_callable
        self.op_args: Any = op_args if op_args is not None else ()
        self.op_kwargs: Any = op_kwargs if op_kwargs is not None else {}
        self.templates_dict = templates_dict
        if templates_exts:
            self.template_ext = tuple(templates_exts)
        self.show_return_value_in_logs = show_return_value_in_logs

    def execute(self, context: Context) -> Any:
        """Call the function."""
        result = self.call(context)
        if self.show_return_value_in_logs and result is not None:
            shown = repr(result)
            self.log.info("Done. Returned value was: %s", shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "...")
        return result

    def call(self, context: Context) -> Any:
        """Call the function with its arguments and what it asks for from the context; coroutines run to their end."""
        if self.templates_dict is not None:
            context["templates_dict"] = self.templates_dict
        kwargs, ignored = keyword_arguments(self.python_callable, self.op_args, self.op_kwargs, context)
        if ignored:
            self.log.warning(
                "%s() does not take %s of op_kwargs; ignored, as in Airflow", self._function_name(), ignored
            )
        result = self.python_callable(*self.op_args, **kwargs)
        return run_to_end(result) if inspect.isawaitable(result) else result

    def _function_name(self) -> str:
        return getattr(self.python_callable, "__name__", repr(self.python_callable))

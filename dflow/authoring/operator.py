"""BaseOperator: one task of a DAG, with the keyword arguments and conventions of Airflow's.

Writing an operator of your own::

    class Greet(BaseOperator):
        template_fields = ("name",)

        def __init__(self, *, name: str, **kwargs):
            super().__init__(**kwargs)
            self.name = name

        def execute(self, context):
            return f"hello {self.name}"

Arguments that the caller leaves out are filled in from ``default_args`` of the operator, its task groups and its DAG,
at every level of the class chain. What Airflow has and dflow does not is refused, not ignored.
"""

from __future__ import annotations

import functools
import inspect
import logging
from abc import ABCMeta
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final

from dflow.authoring import blocks, checks
from dflow.authoring.node import Node, connect_tasks
from dflow.authoring.param import ParamsDict
from dflow.authoring.refusal import Location, did_you_mean, not_supported, refusal, unknown_arguments, user_location
from dflow.authoring.resolvable import producers
from dflow.authoring.rules import TriggerRule, WeightRule

if TYPE_CHECKING:
    from dflow.authoring.context import Context
    from dflow.authoring.dag import DAG
    from dflow.authoring.task_group import TaskGroup
    from dflow.authoring.xcom_arg import XComArg

RENAMED: Final = {
    "task_concurrency": "Airflow renamed it to max_active_tis_per_dag",
    "provide_context": "the context is always provided; leave it out",
    "sla": "SLAs were removed in Airflow 3; leave it out",
    "trigger": "write trigger_rule",
    "xcom_push": "write do_xcom_push",
    "start": "write start_date",
}
# Callbacks and the like would change what happens, so giving one is refused until it is honoured.
_REFUSED: Final = {
    "on_execute_callback": "callbacks",
    "on_failure_callback": "callbacks",
    "on_success_callback": "callbacks",
    "on_retry_callback": "callbacks",
    "on_skipped_callback": "callbacks",
    "retry_policy": "retry policies",
    "inlets": "assets",
    "outlets": "assets",
    "map_index_template": "dynamic task mapping",
    "max_active_tis_per_dag": "limits per task; use a pool",
    "max_active_tis_per_dagrun": "limits per task; use a pool",
    "run_as_user": "impersonation",
    "resources": "resources of a task",
    "executor_config": "executor_config",
    "depends_on_past": "waiting for the previous run",
    "wait_for_downstream": "waiting for the previous run",
}


class OperatorMeta(ABCMeta):
    """Makes every ``__init__`` of an operator class take its missing arguments from ``default_args``."""

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(name, bases, namespace, **kwargs)
        if "__init__" in namespace:
            setattr(cls, "__init__", _with_default_args(namespace["__init__"]))  # noqa: B010 -- mypy: methods are not assignable

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise refusal(f"{cls.__name__} takes keyword arguments only, e.g. {cls.__name__}(task_id=...)")
        operator: Any = cls.__new__(cls)  # type: ignore[call-arg,arg-type]
        operator._inherited = _inherited_defaults(kwargs)
        operator.__init__(**kwargs)
        operator._made()
        return operator


def _inherited_defaults(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default_args in force: the DAG's, overridden by its groups' from outside in, then the own ones."""
    group = kwargs.get("task_group")
    dag = kwargs.get("dag") or (group.dag if group is not None else blocks.current_dag())
    group = group or blocks.current_group(dag)
    merged: dict[str, Any] = dict(dag.default_args) if dag is not None else {}
    if group is not None:
        merged.update(group.inherited_default_args)
    merged.update(kwargs.get("default_args") or {})
    return merged


def _with_default_args(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap one ``__init__`` of the class chain: fill in defaults, name unknown and missing arguments."""
    parameters = list(inspect.signature(init).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    required = [p.name for p in named if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(init)
    def wrapper(self: BaseOperator, *args: Any, **kwargs: Any) -> None:
        given = set(names[: len(args)]) | kwargs.keys()
        for name in names:
            if name not in given and name in self._inherited and name != "default_args":
                kwargs[name] = self._inherited[name]
                self._taken_defaults.add(name)
        if not takes_any and (unknown := [name for name in kwargs if name not in names]):
            raise unknown_arguments(type(self).__name__, unknown, names, RENAMED)
        if missing := [name for name in required if name not in kwargs and name not in names[: len(args)]]:
            raise refusal(
                f"{type(self).__name__} {kwargs.get('task_id', '')!r} needs the argument "
                + " and ".join(repr(name) for name in missing)
            )
        init(self, *args, **kwargs)

    return wrapper


class BaseOperator(Node, metaclass=OperatorMeta):
    """A task.

    Parameters (Airflow's names and meaning; None takes the setting's default where there is one):
        task_id: unique in the DAG; letters, digits, ``_ . -``, at most 250 characters; prefixed by its task group.
        retries: how often the task runs again after it raised or timed out.
        retry_delay, max_retry_delay: timedelta, or seconds as a number.
        retry_exponential_backoff: multiplier of the delay for each further retry, 0 = off, True = 2.0.
        execution_timeout: timedelta after which `AirflowTaskTimeout` is raised inside the task.
        trigger_rule: see `TriggerRule`; weight_rule: see `WeightRule`.
        pool, pool_slots, queue, priority_weight, executor: where and with what precedence it runs.
        params: name to `Param` or default value; override those of the DAG in this task.
        pre_execute, post_execute: called with (context) and (context, result) around ``execute``.
        do_xcom_push, multiple_outputs: whether the result is kept, and whether its keys are kept one by one.
        owner, email, email_on_failure, email_on_retry, doc, doc_md, doc_json, doc_yaml, doc_rst, task_display_name:
            kept for people.

    Raises `DagDefinitionError` for whatever cannot work.
    """

    template_fields: Sequence[str] = ()
    template_ext: Sequence[str] = ()
    template_fields_renderers: ClassVar[Mapping[str, str]] = {}
    ui_color: str = "#fff"
    ui_fgcolor: str = "#000"
    custom_operator_name: ClassVar[str | None] = None

    _inherited: dict[str, Any]
    _dag: DAG | None = None

    def __init__(
        self,
        *,
        task_id: str,
        owner: str | None = None,
        email: str | Iterable[str] | None = None,
        email_on_retry: bool = True,
        email_on_failure: bool = True,
        retries: int | None = None,
        retry_delay: timedelta | float | None = None,
        retry_exponential_backoff: float | bool = 0,
        max_retry_delay: timedelta | float | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        ignore_first_depends_on_past: bool = True,
        wait_for_past_depends_before_skipping: bool = False,
        dag: DAG | None = None,
        params: Mapping[str, Any] | None = None,
        default_args: Mapping[str, Any] | None = None,
        priority_weight: int = 1,
        weight_rule: str = WeightRule.DOWNSTREAM,
        queue: str | None = None,
        pool: str | None = None,
        pool_slots: int = 1,
        execution_timeout: timedelta | None = None,
        pre_execute: Callable[[Context], None] | None = None,
        post_execute: Callable[[Context, Any], None] | None = None,
        trigger_rule: str = TriggerRule.ALL_SUCCESS,
        executor: str | None = None,
        do_xcom_push: bool = True,
        multiple_outputs: bool = False,
        task_group: TaskGroup | None = None,
        doc: str | None = None,
        doc_md: str | None = None,
        doc_json: str | None = None,
        doc_yaml: str | None = None,
        doc_rst: str | None = None,
        task_display_name: str | None = None,
        logger_name: str | None = None,
        allow_nested_operators: bool = True,
        render_template_as_native_obj: bool | None = None,
        on_execute_callback: Any = None,
        on_failure_callback: Any = None,
        on_success_callback: Any = None,
        on_retry_callback: Any = None,
        on_skipped_callback: Any = None,
        retry_policy: Any = None,
        inlets: Any = None,
        outlets: Any = None,
        map_index_template: str | None = None,
        max_active_tis_per_dag: int | None = None,
        max_active_tis_per_dagrun: int | None = None,
        run_as_user: str | None = None,
        resources: Any = None,
        executor_config: Any = None,
        depends_on_past: bool = False,
        wait_for_downstream: bool = False,
        **unknown: Any,
    ) -> None:
        kind = type(self).__name__
        if unknown:
            raise unknown_arguments(f"{kind} {task_id!r}", unknown, argument_names(type(self)), RENAMED)
        given = locals()
        for name, feature in _REFUSED.items():
            if given[name]:
                raise not_supported(f"{name}= of {kind} {task_id!r} ({feature})")

        self._location: Location | None = user_location()  # underscored: `location` is for subclasses
        self.upstream_task_ids: set[str] = set()
        self.downstream_task_ids: set[str] = set()
        self.label = checks.identifier(task_id, "task_id")
        self.task_id = self.label
        self.task_group: TaskGroup | None = None

        self.retries = None if retries is None else checks.integer(retries, f"retries of {task_id!r}", low=0)
        self.retry_delay = checks.duration(retry_delay, f"retry_delay of {task_id!r}", numbers=True)
        self.max_retry_delay = checks.duration(
            max_retry_delay, f"max_retry_delay of {task_id!r}", zero=False, numbers=True
        )
        self.retry_exponential_backoff = _backoff(retry_exponential_backoff, task_id)
        self.execution_timeout = checks.duration(execution_timeout, f"execution_timeout of {task_id!r}", zero=False)
        self.start_date = checks.instant(start_date, f"start_date of task {task_id!r}")
        self.end_date = checks.instant(end_date, f"end_date of task {task_id!r}")
        self.trigger_rule = _trigger_rule(trigger_rule)
        self.weight_rule = _weight_rule(weight_rule)
        self.priority_weight = checks.integer(
            priority_weight, f"priority_weight of {task_id!r}", low=-checks.INT32, high=checks.INT32
        )
        self.pool = checks.text(pool, f"pool of {task_id!r}") or "default_pool"
        self.pool_slots = checks.integer(pool_slots, f"pool_slots of {task_id!r}", low=1)
        self.queue = checks.text(queue, f"queue of {task_id!r}")
        self.executor = checks.text(executor, f"executor of {task_id!r}")
        self.owner = checks.text(owner, f"owner of {task_id!r}")
        self.do_xcom_push = checks.boolean(do_xcom_push, f"do_xcom_push of {task_id!r}")
        self.multiple_outputs = bool(multiple_outputs)
        self.depends_on_past = False
        self.ignore_first_depends_on_past = ignore_first_depends_on_past
        self.wait_for_past_depends_before_skipping = wait_for_past_depends_before_skipping
        self.wait_for_downstream = False
        self.email, self.email_on_retry, self.email_on_failure = email, email_on_retry, email_on_failure
        self.doc, self.doc_json, self.doc_yaml, self.doc_rst = doc, doc_json, doc_yaml, doc_rst
        self.doc_md = checks.text(doc_md, f"doc_md of {task_id!r}")
        self.task_display_name = checks.text(task_display_name, f"task_display_name of {task_id!r}")
        self.allow_nested_operators = allow_nested_operators
        self.render_template_as_native_obj = render_template_as_native_obj
        self.params = ParamsDict(params, what=f"params of task {task_id!r}")
        self._logger_name = logger_name
        self._pre_execute_hook, self._post_execute_hook = pre_execute, post_execute
        self.is_setup = False
        self.is_teardown = False
        self.on_failure_fail_dagrun = False

        if task_group is not None:
            dag = dag or task_group.dag
        dag = dag or blocks.current_dag()
        if dag is not None:
            dag._adopt(self, task_group or blocks.current_group(dag))

    # ---- made by the metaclass around __init__ ----

    @functools.cached_property
    def _taken_defaults(self) -> set[str]:
        """The keys of default_args this operator has used."""
        return set()

    def _made(self) -> None:
        """Finish after the outermost ``__init__``: relations that follow from arguments, and the open blocks."""
        if not hasattr(self, "task_id"):
            raise refusal(f"{type(self).__name__}.__init__ does not call super().__init__(**kwargs)")
        self.connect_arguments()
        blocks.operator_made(self)

    def connect_arguments(self) -> None:
        """Draw edges from the tasks whose results stand in template fields."""
        for name in self.template_fields:
            if not hasattr(self, name):
                raise refusal(
                    f"{type(self).__name__} lists {name!r} in template_fields but its __init__ sets no such attribute"
                    f"{did_you_mean(name, vars(self))}"
                )
            for up in producers(getattr(self, name)):
                connect_tasks(up, self)

    # ---- the graph ----

    @property
    def roots(self) -> Sequence[BaseOperator]:
        """The task itself."""
        return (self,)

    @property
    def leaves(self) -> Sequence[BaseOperator]:
        """The task itself."""
        return (self,)

    @property
    def dag(self) -> DAG:
        """The DAG the task belongs to; raises `DagDefinitionError` when there is none yet."""
        if self._dag is None:
            raise refusal(f"task {self.task_id!r} has not been added to a DAG yet")
        return self._dag

    @dag.setter
    def dag(self, dag: DAG) -> None:
        if self._dag is not dag:
            dag.add_task(self)

    def has_dag(self) -> bool:
        """Return whether the task belongs to a DAG."""
        return self._dag is not None

    @property
    def dag_id(self) -> str:
        """The id of the DAG, or ``adhoc_<owner>`` without one (as in Airflow)."""
        return self._dag.dag_id if self._dag is not None else f"adhoc_{self.owner or 'airflow'}"

    @property
    def upstream_list(self) -> list[BaseOperator]:
        """The tasks directly upstream."""
        return [self.dag.task_dict[task_id] for task_id in sorted(self.upstream_task_ids)]

    @property
    def downstream_list(self) -> list[BaseOperator]:
        """The tasks directly downstream."""
        return [self.dag.task_dict[task_id] for task_id in sorted(self.downstream_task_ids)]

    def get_direct_relative_ids(self, upstream: bool = False) -> set[str]:
        """Return the ids of the tasks directly up- or downstream."""
        return self.upstream_task_ids if upstream else self.downstream_task_ids

    def get_direct_relatives(self, upstream: bool = False) -> list[BaseOperator]:
        """Return the tasks directly up- or downstream."""
        return self.upstream_list if upstream else self.downstream_list

    @property
    def output(self) -> XComArg:
        """What the task returns, to pass to another task."""
        from dflow.authoring.xcom_arg import XComArg

        return XComArg(self)

    # ---- setup and teardown ----

    def as_setup(self) -> BaseOperator:
        """Mark the task as a setup."""
        self.is_setup = True
        return self

    def as_teardown(self, *, setups: Any = None, on_failure_fail_dagrun: bool | None = None) -> BaseOperator:
        """Mark the task as a teardown of ``setups``: it runs if they succeeded, however the work between ended."""
        from dflow.authoring.setup_teardown import make_teardown

        make_teardown(self, setups=setups, on_failure_fail_dagrun=on_failure_fail_dagrun)
        return self

    def __enter__(self) -> BaseOperator:
        from dflow.authoring.setup_teardown import open_block

        open_block(self)
        return self

    def __exit__(self, exc_type: Any, *exc_info: Any) -> None:
        from dflow.authoring.setup_teardown import close_block

        close_block(self, failed=exc_type is not None)

    # ---- running ----

    @property
    def task_type(self) -> str:
        """The class name."""
        return type(self).__name__

    @property
    def operator_name(self) -> str:
        """What people read as the kind of task: ``@task``, or the class name."""
        return self.custom_operator_name or type(self).__name__

    @property
    def log(self) -> logging.Logger:
        """The logger of the task; what it writes goes to the log of the attempt."""
        return logging.getLogger(self._logger_name or "dflow.task")

    def execute(self, context: Context) -> Any:
        """Do the work and return the result. Operators override this."""
        raise TypeError(f"{type(self).__name__} does not define execute(self, context)")

    def pre_execute(self, context: Context) -> None:
        """Called before ``execute``; by default calls the ``pre_execute=`` argument."""
        if self._pre_execute_hook is not None:
            self._pre_execute_hook(context)

    def post_execute(self, context: Context, result: Any = None) -> None:
        """Called after ``execute`` returned; by default calls the ``post_execute=`` argument."""
        if self._post_execute_hook is not None:
            self._post_execute_hook(context, result)

    def on_kill(self) -> None:
        """Called when the task is cancelled or times out; end what it started elsewhere."""

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """Airflow starts dynamic task mapping here."""
        raise not_supported(f"{cls.__name__}.partial() (dynamic task mapping)")

    def expand(self, **kwargs: Any) -> Any:
        """Airflow expands a mapped task here."""
        raise not_supported(f"{type(self).__name__}.expand() (dynamic task mapping)")

    def __repr__(self) -> str:
        return f"<Task({self.operator_name}): {self.task_id}>"


def argument_names(cls: type) -> Collection[str]:
    """Return every argument name that the ``__init__`` methods of the class chain take."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None or base is object:
            continue
        for parameter in list(inspect.signature(init).parameters.values())[1:]:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                names[parameter.name] = None
    return names


def _backoff(value: object, task_id: str) -> float:
    if value is True:
        return 2.0
    if value is False or value is None:
        return 0.0
    if not isinstance(value, int | float) or not 0 <= value < 1e6 or (0 < value < 1):
        raise refusal(
            f"retry_exponential_backoff of {task_id!r} is the multiplier of the delay: a number of 1 or more, or 0 "
            f"for off; got {value!r}"
        )
    return float(value)


def _trigger_rule(value: object) -> str:
    if value == "none_failed_or_skipped":
        raise refusal("trigger_rule 'none_failed_or_skipped' was renamed: use 'none_failed_min_one_success'")
    if value == "dummy":
        raise refusal("trigger_rule 'dummy' was renamed: use 'always'")
    return checks.one_of(value, "trigger_rule", list(TriggerRule))


def _weight_rule(value: object) -> str:
    if not isinstance(value, str):
        raise not_supported(f"weight_rule {value!r} (a priority strategy of your own)", "use a WeightRule")
    return checks.one_of(value, "weight_rule", list(WeightRule))

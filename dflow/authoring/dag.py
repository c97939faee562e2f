"""DAG: a named graph of tasks with a schedule, written as ``with DAG("id", schedule="@daily", ...):``.

What is checked while it is built is what can be known then; `validate` checks the whole, and `to_spec` calls it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from dflow.authoring import blocks, checks
from dflow.authoring.defaults import Defaults
from dflow.authoring.exceptions import ParamValidationError
from dflow.authoring.param import DagParam, ParamsDict, check_schema
from dflow.authoring.refusal import did_you_mean, not_supported, refusal, unknown_arguments, user_location
from dflow.authoring.rules import TriggerRule
from dflow.authoring.schedule import schedule_spec
from dflow.authoring.task_group import TaskGroup, unique_id
from dflow.core.errors import DagCycleError, DagDefinitionError, DuplicateTaskIdError
from dflow.core.spec import ScheduleSpec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dflow.authoring.operator import BaseOperator
    from dflow.core.spec import DagSpec

logger = logging.getLogger(__name__)

_RENAMED: Final = {
    "schedule_interval": "Airflow 3 renamed it to schedule",
    "timetable": "Airflow 3 renamed it to schedule",
    "concurrency": "Airflow 3 renamed it to max_active_tasks",
    "fail_stop": "Airflow 3 renamed it to fail_fast",
    "orientation": "it was removed in Airflow 3; leave it out",
    "default_view": "it was removed in Airflow 3; leave it out",
    "sla_miss_callback": "SLAs were removed in Airflow 3; leave it out",
    "full_filepath": "it was removed; leave it out",
}
_REFUSED: Final = {
    "deadline": "deadlines",
    "on_success_callback": "callbacks",
    "on_failure_callback": "callbacks",
    "max_consecutive_failed_dag_runs": "pausing after failed runs",
    "allowed_run_types": "restricting run types",
    "access_control": "access control per DAG",
    "rerun_with_latest_version": "re-running on the latest code by default",
    "disable_bundle_versioning": "running without pinned code",
}


class Code(Protocol):
    """Where a DAG was loaded from; `dflow.runtime.loader.LoadedFile` is one."""

    def active(self) -> AbstractContextManager[None]:
        """Make the modules of the DAG's bundle importable inside the block."""
        ...


class DAG:
    """A graph of tasks.

    Parameters (Airflow's names and meaning; None takes the setting's default where there is one):
        dag_id: letters, digits, ``_ . -``, at most 250 characters.
        schedule: None, a preset, a cron expression, a timedelta or a timetable; cron is read in the zone of start_date.
        start_date, end_date: aware datetimes; the first and last instant a scheduled run may be for.
        catchup: whether runs missed since start_date are made up for; needs a start_date.
        max_active_runs: runs that are active at once. max_active_tasks: tasks of one run that are active at once.
        dagrun_timeout: timedelta after which an unfinished run fails.
        default_args: arguments the DAG's operators take when not given.
        params: name to `Param` or default value; a DAG with a schedule needs valid defaults for all.
        template_searchpath, template_undefined, user_defined_macros, user_defined_filters, jinja_environment_kwargs,
            render_template_as_native_obj: how templates are found and rendered.
        description, dag_display_name, doc_md, tags, owner_links: for people.
        is_paused_upon_creation: overrides the setting when the DAG is first seen.
        auto_register: whether a `with` block's DAG is found although no variable of the module holds it.

    Raises `DagDefinitionError` for whatever cannot work.
    """

    def __init__(
        self,
        dag_id: str,
        *,
        description: str | None = None,
        schedule: Any = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        template_searchpath: str | Iterable[str] | None = None,
        template_undefined: Any = None,
        user_defined_macros: Mapping[str, Any] | None = None,
        user_defined_filters: Mapping[str, Callable[..., Any]] | None = None,
        default_args: Mapping[str, Any] | None = None,
        max_active_tasks: int | None = None,
        max_active_runs: int | None = None,
        max_consecutive_failed_dag_runs: int = 0,
        dagrun_timeout: timedelta | None = None,
        deadline: Any = None,
        catchup: bool | None = None,
        on_success_callback: Any = None,
        on_failure_callback: Any = None,
        doc_md: str | None = None,
        params: Mapping[str, Any] | None = None,
        access_control: Any = None,
        is_paused_upon_creation: bool | None = None,
        jinja_environment_kwargs: Mapping[str, Any] | None = None,
        render_template_as_native_obj: bool = False,
        tags: Collection[str] | None = None,
        owner_links: Mapping[str, str] | None = None,
        auto_register: bool = True,
        fail_fast: bool = False,
        allowed_run_types: Any = None,
        dag_display_name: str | None = None,
        disable_bundle_versioning: bool = False,
        rerun_with_latest_version: bool | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise unknown_arguments(f"DAG {dag_id!r}", unknown, ARGUMENTS, _RENAMED)
        given = locals()
        for name, feature in _REFUSED.items():
            if given[name]:
                raise not_supported(f"{name}= of DAG {dag_id!r} ({feature})")

        self.dag_id = checks.identifier(dag_id, "dag_id")
        self.location = user_location()
        self.fileloc = os.path.abspath(self.location.file) if self.location else ""
        self.code: Code | None = None  # set by the loader
        self.default_args: dict[str, Any] = _default_args(default_args)
        self.description = checks.text(description, f"description of {dag_id!r}")
        self.dag_display_name = checks.text(dag_display_name, f"dag_display_name of {dag_id!r}")
        self.doc_md = _document(checks.text(doc_md, f"doc_md of {dag_id!r}"), os.path.dirname(self.fileloc))
        self.tags = _tags(tags)
        self.owner_links = _owner_links(owner_links)

        self.start_date = checks.instant(start_date or self.default_args.get("start_date"), f"start_date of {dag_id!r}")
        self.end_date = checks.instant(end_date or self.default_args.get("end_date"), f"end_date of {dag_id!r}")
        if self.start_date and self.end_date and self.end_date < self.start_date:
            raise refusal(f"DAG {dag_id!r} ends ({self.end_date}) before it starts ({self.start_date})")
        self.schedule = schedule
        self.timezone = self._zone()
        schedule_spec(schedule, self.timezone or "UTC")  # refuses here, on the user's line
        self.catchup = None if catchup is None else checks.boolean(catchup, f"catchup of {dag_id!r}")
        if self.catchup and schedule is not None and self.start_date is None:
            raise refusal(f"DAG {dag_id!r} has catchup=True but no start_date; say from when with start_date=...")

        self.max_active_runs = (
            None
            if max_active_runs is None
            else checks.integer(max_active_runs, f"max_active_runs of {dag_id!r}", low=1)
        )
        if schedule == "@continuous" and (self.max_active_runs or 1) > 1:
            raise refusal(f"DAG {dag_id!r} has schedule '@continuous', which allows max_active_runs=1 only")
        self.max_active_tasks = (
            None
            if max_active_tasks is None
            else checks.integer(max_active_tasks, f"max_active_tasks of {dag_id!r}", low=1)
        )
        self.dagrun_timeout = checks.duration(dagrun_timeout, f"dagrun_timeout of {dag_id!r}", zero=False)
        self.fail_fast = checks.boolean(fail_fast, f"fail_fast of {dag_id!r}")
        self.is_paused_upon_creation = is_paused_upon_creation
        self.auto_register = auto_register

        self.params = ParamsDict(params, what=f"params of DAG {dag_id!r}")
        self.template_searchpath = (
            [template_searchpath] if isinstance(template_searchpath, str) else list(template_searchpath or ())
        )
        self.template_undefined = template_undefined
        self.user_defined_macros = dict(user_defined_macros or {})
        self.user_defined_filters = dict(user_defined_filters or {})
        self.jinja_environment_kwargs = dict(jinja_environment_kwargs or {})
        self.render_template_as_native_obj = checks.boolean(
            render_template_as_native_obj, f"render_template_as_native_obj of {dag_id!r}"
        )

        self.task_dict: dict[str, BaseOperator] = {}
        self.task_group_dict: dict[str, TaskGroup] = {}
        self.used_ids: dict[str, BaseOperator | TaskGroup] = {}
        self.suffixes: dict[str, int] = {}  # the last number given to a repeated id
        self.edge_labels: dict[tuple[str, str], str] = {}
        self.task_group = TaskGroup(None, dag=self)

    def _zone(self) -> str | None:
        zone = self.start_date.tzinfo if self.start_date is not None else None
        return None if zone is None else checks.zone_name(zone, f"start_date of {self.dag_id!r}")

    # ---- tasks ----

    def add_task(self, task: BaseOperator) -> None:
        """Add an operator that was made without a DAG."""
        if task._dag is not None and task._dag is not self:
            raise refusal(f"task {task.task_id!r} already belongs to DAG {task._dag.dag_id!r}")
        if task._dag is None:
            self._adopt(task, blocks.current_group(self) or self.task_group)

    def add_tasks(self, tasks: Iterable[BaseOperator]) -> None:
        """Add several operators that were made without a DAG."""
        for task in tasks:
            self.add_task(task)

    def _adopt(self, task: BaseOperator, group: TaskGroup | None) -> None:
        group = group or self.task_group
        if group.dag is not self:
            raise refusal(
                f"task {task.label!r} is given DAG {self.dag_id!r} and a task group of DAG {group.dag.dag_id!r}"
            )
        if task._dag is not None:
            raise refusal(f"task {task.task_id!r} already belongs to DAG {task._dag.dag_id!r}")
        task_id = checks.identifier(group.child_id(task.label), "task_id with the prefix of its groups")
        if task_id in self.used_ids:
            other = self.used_ids[task_id]._location
            raise refusal(
                f"task id {task_id!r} is already used in DAG {self.dag_id!r}{f' ({other})' if other else ''}; "
                "choose another task_id",
                kind=DuplicateTaskIdError,
            )
        task.task_id = task_id
        task.task_group = group
        task._dag = self
        group.children[task_id] = task
        self.used_ids[task_id] = task
        self.task_dict[task_id] = task

    def free_task_id(self, label: str, group: TaskGroup | None) -> str:
        """Return ``label`` with the suffix that makes its full id free in ``group``."""
        return unique_id(label, group or self.task_group)

    @property
    def tasks(self) -> list[BaseOperator]:
        """Every task."""
        return list(self.task_dict.values())

    @property
    def task_ids(self) -> list[str]:
        """The id of every task."""
        return list(self.task_dict)

    @property
    def roots(self) -> list[BaseOperator]:
        """The tasks with nothing upstream."""
        return [task for task in self.task_dict.values() if not task.upstream_task_ids]

    @property
    def leaves(self) -> list[BaseOperator]:
        """The tasks with nothing downstream."""
        return [task for task in self.task_dict.values() if not task.downstream_task_ids]

    def has_task(self, task_id: str) -> bool:
        """Return whether there is a task of that id."""
        return task_id in self.task_dict

    def get_task(self, task_id: str) -> BaseOperator:
        """Return the task of that id; KeyError if there is none."""
        return self.task_dict[task_id]

    def get_edge_info(self, upstream_task_id: str, downstream_task_id: str) -> dict[str, str | None]:
        """Return ``{"label": ...}`` of an edge, empty without a label."""
        label = self.edge_labels.get((upstream_task_id, downstream_task_id))
        return {} if label is None else {"label": label}

    def param(self, name: str, default: Any = None) -> DagParam:
        """Return the param ``name`` as a value to pass to operators, adding it with ``default`` if it is new."""
        if name not in self.params:
            self.params[name] = default
        return DagParam(name)

    @property
    def folder(self) -> str:
        """The folder of the DAG file; templates are looked for there."""
        return os.path.dirname(self.fileloc)

    # ---- checks of the whole ----

    def schedule_spec(self, defaults: Defaults | None = None) -> ScheduleSpec:
        """Return the schedule as plain data; without a start_date cron is read in the default time zone."""
        zone = self.timezone or checks.zone_name((defaults or Defaults()).timezone, "core.default_timezone")
        return schedule_spec(self.schedule, zone)

    def validate(self) -> None:
        """Check what only the finished DAG shows; raises `DagDefinitionError` naming the line of the task."""
        for task in list(self.task_dict.values()):
            try:
                task.connect_arguments()  # once more: arguments may have been set after the task was made
            except DagDefinitionError as error:
                raise error if error.file else refusal(error.message, at=task._location) from None
        self._check_cycles()
        self._check_params()
        first = self.start_date or min((t.start_date for t in self.task_dict.values() if t.start_date), default=None)
        for task in self.task_dict.values():
            self._check_task(task, first)

    def _check_cycles(self) -> None:
        cycle = find_cycle({task_id: task.downstream_task_ids for task_id, task in self.task_dict.items()})
        if cycle:
            raise refusal(
                f"the tasks of DAG {self.dag_id!r} depend on each other in a circle: {' >> '.join(cycle)}; "
                "remove one of these relations",
                at=self.task_dict[cycle[0]]._location or self.location,
                kind=DagCycleError,
            )

    def _check_params(self) -> None:
        for owner, params, location in (
            (f"DAG {self.dag_id!r}", self.params, self.location),
            *((f"task {task.task_id!r}", task.params, task._location) for task in self.task_dict.values()),
        ):
            for name in params:
                param = params.get_param(name)
                try:
                    check_schema(name, param.schema)
                    if self.schedule is not None:  # nobody is there to give what a default does not
                        param.resolve(name=name)
                except ParamValidationError as error:
                    scheduled = "; a DAG with a schedule needs valid defaults" if self.schedule is not None else ""
                    raise refusal(f"{owner}: {error}{scheduled}", at=location) from None

    def _check_task(self, task: BaseOperator, first: datetime | None) -> None:
        if self.fail_fast and not task.is_teardown and task.trigger_rule != TriggerRule.ALL_SUCCESS:
            raise refusal(
                f"task {task.task_id!r} has trigger_rule {task.trigger_rule!r}; a DAG with fail_fast=True allows only "
                "'all_success'",
                at=task._location,
            )
        if task.is_setup and task.is_teardown:
            raise refusal(f"task {task.task_id!r} is a setup and a teardown; it can be one of them", at=task._location)
        if task.trigger_rule == TriggerRule.ALL_DONE_SETUP_SUCCESS and not task.is_teardown:
            raise refusal(
                f"task {task.task_id!r} has trigger_rule 'all_done_setup_success', which only teardowns have",
                at=task._location,
            )
        if task.start_date is not None and first is not None and task.start_date > first:
            raise not_supported(f"start_date of task {task.task_id!r} later than that of its DAG", at=task._location)
        if task.end_date is not None and (self.end_date is None or task.end_date < self.end_date):
            raise not_supported(f"end_date of task {task.task_id!r} before that of its DAG", at=task._location)

    def warn_of_unused_defaults(self) -> None:
        """Log a warning for keys of default_args that no operator of the DAG takes; Airflow ignores them silently."""
        from dflow.authoring.operator import argument_names

        known: set[str] = set()
        for operator_class in {type(task) for task in self.task_dict.values()}:
            known.update(argument_names(operator_class))
        for name in self.default_args.keys() - known if known else ():
            logger.warning(
                "%s: default_args of DAG %r has %r, which no operator of it takes%s",
                self.location, self.dag_id, name, did_you_mean(name, known),
            )  # fmt: skip

    # ---- use ----

    def to_spec(self, defaults: Defaults | None = None) -> DagSpec:
        """Check the DAG as a whole and return it as plain data; see `dflow.authoring.spec_builder.to_spec`."""
        from dflow.authoring.spec_builder import to_spec

        return to_spec(self, defaults)

    def test(
        self,
        run_after: datetime | None = None,
        logical_date: datetime | None = None,
        run_conf: Mapping[str, Any] | None = None,
        conn_file_path: str | None = None,
        variable_file_path: str | None = None,
        use_executor: bool = False,
        mark_success_pattern: str | None = None,
    ) -> Any:
        """Run the DAG in this process, with no service, through the planner and runner of the real thing.

        Returns a `dflow.runtime.inline.InlineRun` with the states. Task logs go to stderr.
        Example: ``if __name__ == "__main__": dag.test(run_conf={"n": 3})``.
        """
        for name, value in {
            "conn_file_path": conn_file_path,
            "variable_file_path": variable_file_path,
            "use_executor": use_executor,
            "mark_success_pattern": mark_success_pattern,
        }.items():
            if value:
                raise not_supported(f"{name}= of DAG.test()")
        # The one step from authoring up to runtime, taken only when somebody asks for a run.
        inline = importlib.import_module("dflow.runtime.inline")
        return inline.run_dag(self, conf=run_conf, logical_date=logical_date, run_after=run_after)

    def __enter__(self) -> DAG:
        blocks.enter_dag(self)
        return self

    def __exit__(self, exc_type: Any, *exc_info: object) -> None:
        blocks.leave_dag()
        if exc_type is None:
            blocks.dag_made(self)

    def __repr__(self) -> str:
        return f"<DAG: {self.dag_id}>"


ARGUMENTS: Final = tuple(name for name in inspect.signature(DAG).parameters if name != "unknown")


def find_cycle(downstream: Mapping[str, Collection[str]]) -> list[str]:
    """Return the ids of one circle in the graph, its first repeated at the end; empty when there is none."""
    done: set[str] = set()
    for root in downstream:
        if root in done:
            continue
        path: list[str] = [root]
        on_path = {root}
        branches: list[Iterator[str]] = [iter(sorted(downstream[root]))]
        while branches:
            step = next(branches[-1], None)
            if step is None:
                branches.pop()
                last = path.pop()
                on_path.discard(last)
                done.add(last)
            elif step in on_path:
                return [*path[path.index(step) :], step]
            elif step not in done:
                path.append(step)
                on_path.add(step)
                branches.append(iter(sorted(downstream[step])))
    return []


def _default_args(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise refusal(f"default_args must be a dict, not {type(value).__name__}")
    return dict(value or {})


def _tags(tags: Any) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise refusal(f"tags must be a list of strings, not the string {tags!r}; write tags=[{tags!r}]")
    for tag in tags or ():
        if not isinstance(tag, str) or not tag or len(tag) > checks.MAX_TAG_LENGTH:
            raise refusal(f"tag {tag!r} must be a string of 1 to {checks.MAX_TAG_LENGTH} characters")
    return tuple(sorted(set(tags or ())))


def _owner_links(links: Mapping[str, str] | None) -> dict[str, str]:
    for owner, link in (links or {}).items():
        parts = urlsplit(link if isinstance(link, str) else "")
        if not ((parts.scheme in ("http", "https") and parts.netloc) or (parts.scheme == "mailto" and parts.path)):
            raise refusal(f"owner_links of {owner!r} must be a http(s) or mailto link, not {link!r}")
    return dict(links or {})


def _document(doc_md: str | None, folder: str) -> str | None:
    """Return the text; a path that ends in .md stands for the content of that file, as in Airflow."""
    if doc_md is None or not doc_md.endswith(".md") or "\n" in doc_md:
        return doc_md
    path = os.path.join(folder, doc_md)
    if not os.path.isfile(path):
        return doc_md
    with open(path, encoding="utf-8") as file:
        return file.read()

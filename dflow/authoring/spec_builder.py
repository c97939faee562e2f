"""From a finished `DAG` to a plain `DagSpec`: what the dag-processor stores and the scheduler plans with.

The result depends on nothing but the DAG and the defaults: the same file gives the same spec, field by field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dflow.authoring import checks
from dflow.authoring.defaults import Defaults
from dflow.authoring.operators.empty import EmptyOperator
from dflow.core.graph import effective_priorities
from dflow.core.spec import DagSpec, GroupSpec, TaskSpec

if TYPE_CHECKING:
    from dflow.authoring.dag import DAG
    from dflow.authoring.operator import BaseOperator
    from dflow.authoring.task_group import TaskGroup


def to_spec(dag: DAG, defaults: Defaults | None = None) -> DagSpec:
    """Check the DAG as a whole and return it as plain data.

    Parameters:
        dag: the DAG, as a file defines it.
        defaults: what stands in for arguments that were not given; see `Defaults.from_settings`.

    Raises `DagDefinitionError` (cycles, params without defaults, ...) naming the user's file and line.
    """
    defaults = defaults or Defaults()
    dag.validate()
    dag.warn_of_unused_defaults()
    spec = DagSpec(
        dag_id=dag.dag_id,
        tasks=tuple(task_spec(dag.task_dict[task_id], defaults) for task_id in sorted(dag.task_dict)),
        groups=tuple(_group_spec(dag.task_group_dict[group_id]) for group_id in sorted(dag.task_group_dict)),
        schedule=dag.schedule_spec(defaults),
        description=dag.description,
        dag_display_name=dag.dag_display_name,
        doc_md=dag.doc_md,
        tags=dag.tags,
        owner_links=dict(dag.owner_links),
        start_date=checks.utc(dag.start_date or _earliest_start(dag)),
        end_date=checks.utc(dag.end_date),
        catchup=_catchup(dag, defaults),
        max_active_runs=_max_active_runs(dag, defaults),
        max_active_tasks=dag.max_active_tasks or defaults.max_active_tasks,
        dagrun_timeout_seconds=_seconds(dag.dagrun_timeout),
        params=_plain(dag.params.dump()),
        is_paused_upon_creation=dag.is_paused_upon_creation,
        fail_fast=dag.fail_fast,
        render_template_as_native_obj=dag.render_template_as_native_obj,
        edge_labels={f"{up}>{down}": label for (up, down), label in sorted(dag.edge_labels.items())},
    )
    priorities = effective_priorities(spec)
    tasks = tuple(replace(task, effective_priority=priorities[task.task_id]) for task in spec.tasks)
    return replace(spec, tasks=tasks)


def task_spec(task: BaseOperator, defaults: Defaults) -> TaskSpec:
    """Return one task as plain data; its effective priority is filled in by `to_spec`, which knows the graph."""
    timeout = _seconds(task.execution_timeout)
    delay = _seconds(task.retry_delay)
    group = task.task_group
    return TaskSpec(
        task_id=task.task_id,
        operator=task.operator_name,
        upstream=tuple(sorted(task.upstream_task_ids)),
        trigger_rule=task.trigger_rule,
        retries=defaults.retries if task.retries is None else task.retries,
        retry_delay_seconds=defaults.retry_delay_seconds if delay is None else delay,
        retry_exponential_backoff=task.retry_exponential_backoff,
        max_retry_delay_seconds=_seconds(task.max_retry_delay),
        execution_timeout_seconds=defaults.execution_timeout_seconds if timeout is None else timeout,
        pool=task.pool,
        pool_slots=task.pool_slots,
        priority_weight=task.priority_weight,
        weight_rule=task.weight_rule,
        queue=task.queue or defaults.queue,
        executor=task.executor,
        owner=task.owner or defaults.owner,
        is_empty=is_empty(task),
        is_setup=task.is_setup,
        is_teardown=task.is_teardown,
        on_failure_fail_dagrun=task.on_failure_fail_dagrun,
        do_xcom_push=task.do_xcom_push,
        depends_on_past=task.depends_on_past,
        doc_md=task.doc_md or task.doc,
        task_display_name=task.task_display_name,
        task_group=group.group_id if group is not None else None,
        ui_color=task.ui_color,
        ui_fgcolor=task.ui_fgcolor,
        params=_plain(task.params.dump()),
        template_fields=tuple(task.template_fields),
    )


def is_empty(task: BaseOperator) -> bool:
    """Return whether a task has nothing to run: an EmptyOperator without hooks of its own."""
    return type(task) is EmptyOperator and task._pre_execute_hook is None and task._post_execute_hook is None


def _group_spec(group: TaskGroup) -> GroupSpec:
    assert group.group_id is not None
    parent = group.parent_group
    return GroupSpec(
        group_id=group.group_id,
        parent=parent.group_id if parent is not None else None,
        display_name=group.group_display_name,
        tooltip=group.tooltip,
    )


def _catchup(dag: DAG, defaults: Defaults) -> bool:
    return defaults.catchup if dag.catchup is None else dag.catchup


def _max_active_runs(dag: DAG, defaults: Defaults) -> int:
    if dag.schedule == "@continuous":
        return 1
    return dag.max_active_runs or defaults.max_active_runs


def _earliest_start(dag: DAG) -> Any:
    return min((task.start_date for task in dag.tasks if task.start_date is not None), default=None)


def _seconds(value: timedelta | None) -> float | None:
    return None if value is None else value.total_seconds()


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return params as JSON gives them back, so that a spec equals itself after a round trip."""
    return json.loads(json.dumps(params))  # type: ignore[no-any-return]

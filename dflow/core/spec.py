"""A DAG as plain data: what the dag-processor serializes, what the scheduler plans with, what the worker is told.

Everything here is frozen and holds only JSON-like values, instants (aware UTC datetimes) and durations in seconds.
Nothing in a spec refers to user code by anything but names that the bundle of the run resolves. See
`dflow.core.serialization` for the canonical JSON form and its schema version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """When runs are due.

    ``kind`` is one of ``none``, ``once``, ``continuous``, ``cron``, ``delta``. ``expression`` is the five-field cron
    expression for ``cron`` (presets are resolved before they get here); ``interval_seconds`` the period for ``delta``.
    ``timezone`` is an IANA name; it governs cron and, for deltas of whole days, the wall clock.
    """

    kind: str = "none"
    expression: str | None = None
    interval_seconds: float | None = None
    timezone: str = "UTC"
    summary: str = "None"  # what people read: "@daily", "0 3 * * *", "1 day, 0:00:00", "None"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One task of a DAG."""

    task_id: str
    operator: str  # class name, for people
    upstream: tuple[str, ...] = ()  # direct upstream task ids, sorted
    trigger_rule: str = "all_success"
    retries: int = 0  # user retries: how often a task that raised runs again
    retry_delay_seconds: float = 300.0
    retry_exponential_backoff: float = 0.0  # multiplier, 0 = off (Airflow 3.3 semantics; True means 2.0)
    max_retry_delay_seconds: float | None = None
    execution_timeout_seconds: float | None = None
    pool: str = "default_pool"
    pool_slots: int = 1
    priority_weight: int = 1
    weight_rule: str = "downstream"
    effective_priority: int = 1  # priority_weight combined over the graph by weight_rule; what admission sorts by
    queue: str = "default"
    executor: str | None = None
    owner: str = "airflow"
    is_empty: bool = False  # nothing to run: the planner completes it without a worker
    is_setup: bool = False
    is_teardown: bool = False
    on_failure_fail_dagrun: bool = False
    do_xcom_push: bool = True
    depends_on_past: bool = False
    doc_md: str | None = None
    task_display_name: str | None = None
    task_group: str | None = None  # id of the group it lies in, full path, None = root
    ui_color: str | None = None
    ui_fgcolor: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)  # JSON Schema form, see ParamSpec of DagSpec
    template_fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """A task group: a name space and a fold in the UI; it has no state."""

    group_id: str
    parent: str | None = None
    display_name: str | None = None
    tooltip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DagSpec:
    """One DAG. ``params`` maps a name to ``{"value": default, "description": str | None, "schema": {...}}``."""

    dag_id: str
    tasks: tuple[TaskSpec, ...] = ()  # sorted by task_id
    groups: tuple[GroupSpec, ...] = ()  # sorted by group_id
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    description: str | None = None
    dag_display_name: str | None = None
    doc_md: str | None = None
    tags: tuple[str, ...] = ()
    owner_links: Mapping[str, str] = field(default_factory=dict)
    start_date: datetime | None = None
    end_date: datetime | None = None
    catchup: bool = False
    max_active_runs: int = 16
    max_active_tasks: int = 16  # per run, as in Airflow 3
    dagrun_timeout_seconds: float | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    is_paused_upon_creation: bool | None = None
    fail_fast: bool = False
    render_template_as_native_obj: bool = False
    edge_labels: Mapping[str, str] = field(default_factory=dict)  # "up>down" -> label

"""A small world for tests of the store, made through its own functions: a DAG, its runs, and steps of their tasks."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from dflow.core.spec import DagSpec, TaskSpec
from dflow.core.states import Reason, RunType, TaskState
from dflow.store import dags, runs, tasks, workers
from dflow.store.apply import Change, apply

T0 = datetime(2026, 11, 1, tzinfo=UTC)


def spec(dag_id="d", task_ids=("a", "b"), **fields):
    """A DAG of tasks in a chain."""
    chain = []
    for position, task_id in enumerate(task_ids):
        upstream = (task_ids[position - 1],) if position else ()
        chain.append(TaskSpec(task_id=task_id, operator="PythonOperator", upstream=upstream))
    return DagSpec(dag_id=dag_id, tasks=tuple(sorted(chain, key=lambda task: task.task_id)), **fields)


def with_tasks(dag, **fields):
    """The same DAG, every task changed."""
    return replace(dag, tasks=tuple(replace(task, **fields) for task in dag.tasks))


def add_dag(tx, dag=None, *, path="d.py", bundle_hash="h1", paused=False):
    return dags.upsert(tx, dag or spec(), bundle_name="dags", path=path, bundle_hash=bundle_hash, paused_default=paused)


def add_run(tx, dag_id="d", *, run_id=None, logical_date=None, run_after=None, conf=None, run_type=RunType.MANUAL):
    return runs.create(
        tx,
        dag_id=dag_id,
        run_id=run_id or uuid.uuid4().hex,
        run_type=run_type,
        logical_date=logical_date,
        data_interval_start=logical_date,
        data_interval_end=logical_date,
        run_after=run_after or T0,
        conf=conf,
        triggered_by="test",
    )


def add_worker(tx, name="w1", *, lease_seconds=30.0, **fields):
    given = {
        "worker_id": str(uuid.uuid4()),
        "hostname": "host",
        "pid": 1,
        "executor": "CeleryExecutor",
        "queues": ["default"],
        "concurrency": 4,
        "version": "0",
    } | fields
    return workers.register(tx, name=name, lease_seconds=lease_seconds, **given)


def move(tx, ti_id, to_state, **fields):
    """One step of a task instance from whatever state it is in."""
    now = tasks.get_by_id(tx, ti_id)
    change = Change(
        ti_id=ti_id,
        from_state=TaskState(now.state),
        to_state=to_state,
        reason=fields.pop("reason", Reason.MARKED),
        attempt_id=now.attempt_id,
        actor="test",
        **fields,
    )
    (applied,) = apply(tx, [change])
    return applied


def start(tx, ti_id, worker):
    """Bring a new task instance to running on a worker; returns the attempt id."""
    for state in (TaskState.SCHEDULED, TaskState.QUEUED):
        move(tx, ti_id, state)
    return move(tx, ti_id, TaskState.RUNNING, worker_id=worker.id, hostname=worker.hostname, pid=7).attempt_id


def queue(tx, ti_id):
    move(tx, ti_id, TaskState.SCHEDULED)
    return move(tx, ti_id, TaskState.QUEUED).attempt_id


def ids(tx, run):
    """``{task_id: ti_id}`` of a run."""
    return {ti.task_id: ti.id for ti in tasks.list_for_run(tx, run.id)}


def day(number):
    return T0 + timedelta(days=number)

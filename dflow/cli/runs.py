"""`dflow runs`: look at runs, wait for one, cancel one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dflow.cli.output import Output, OutputOption, note, show_list, show_record, write
from dflow.cli.session import load_settings, open_store, transaction, user
from dflow.cli.watch import summary, watch
from dflow.core.states import RunState

if TYPE_CHECKING:
    from dflow.settings import Settings
    from dflow.store.engine import Tx
    from dflow.store.runs import Run
    from dflow.store.tasks import TaskInstance

app = typer.Typer(no_args_is_help=True, help="Look at runs, wait for one, cancel one.")

LATEST = "latest"
DagId = Annotated[str, typer.Argument(metavar="DAG", help="The DAG.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id, or `latest`.")]

_LIST = ("dag_id", "run_id", "state", "run_type", "logical_date", "started_at", "duration_seconds", "cause")
# What people are shown: the rest stands in the run's id, and a line has only so much room.
_SHOWN = ("dag_id", "run_id", "state", "started_at", "duration_seconds", "cause")
_TASKS = (
    "task_id",
    "map_index",
    "state",
    "try_number",
    "started_at",
    "duration_seconds",
    "hostname",
    "reason",
    "cause",
)


@app.command("list", epilog="Example: dflow runs list tz_report --state failed --output json")
def list_runs(
    dag_id: Annotated[str | None, typer.Argument(metavar="DAG", help="Only runs of this DAG.")] = None,
    state: Annotated[list[RunState] | None, typer.Option(help="Only runs in this state; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    output: OutputOption = Output.TABLE,
) -> None:
    """List runs, newest first."""
    from dflow.store import dags, runs

    with transaction() as tx:
        if dag_id is not None:
            dags.get(tx, dag_id)
        found = [summary(run) for run in runs.list_(tx, dag_id, state or None, limit)]
    show_list(found, output, columns=_SHOWN if output is Output.TABLE else _LIST, empty="No runs.")


@app.command()
def show(dag_id: DagId, run_id: RunId, output: OutputOption = Output.TABLE) -> None:
    """Show one run and its tasks: states, tries, and why each ended as it did."""
    from dflow.store import runs

    with transaction() as tx:
        run = find_run(tx, dag_id, run_id)
        counts = runs.state_counts(tx, run.id)
        rows = task_rows(tx, run)
    record = summary(run) | {
        "conf": run.conf,
        "triggered_by": run.triggered_by,
        "cancelled_by": run.cancelled_by,
        "dag_version_id": run.dag_version_id,
        "bundle_hash": run.bundle_hash,
        "states": counts,
    }
    if output in {Output.JSON, Output.YAML}:
        show_record(record | {"tasks": rows}, output)
        return
    show_record({key: value for key, value in record.items() if value is not None}, output)
    write("\n")
    show_list(rows, output, columns=_TASKS, empty="No tasks.")


@app.command()
def cancel(dag_id: DagId, run_id: RunId) -> None:
    """Cancel a run: what waits is skipped, what runs is ended, the run fails."""
    from dflow.store import runs

    settings = load_settings()
    with open_store(settings) as store:
        run = store.run(lambda tx: runs.cancel(tx, dag_id, find_run(tx, dag_id, run_id).run_id, user()))
    ring(settings)
    if run.is_ended:
        note(f"The run {run.run_id} is cancelled.")
    else:
        note(f"The run {run.run_id} is being cancelled; its running tasks are ended within seconds.")


@app.command(epilog="Example: dflow runs wait tz_report latest --timeout 600")
def wait(
    dag_id: DagId,
    run_id: RunId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Wait at most so many seconds.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Wait for a run's end. Exit codes: 0 success, 1 failed, 124 not in time, 130 Ctrl-C."""
    settings = load_settings()
    with open_store(settings) as store:
        run = store.run(lambda tx: find_run(tx, dag_id, run_id))
        watch(settings, store, dag_id, run.run_id, timeout_seconds=timeout, form=output)


def find_run(tx: Tx, dag_id: str, run_id: str) -> Run:
    """Return the run of that id, or the newest for ``latest``. Raises NotFoundError."""
    from dflow.store import dags, runs

    if run_id != LATEST:
        return runs.get(tx, dag_id, run_id)
    dags.get(tx, dag_id)
    newest = runs.list_(tx, dag_id, limit=1)
    if not newest:
        from dflow.core.errors import NotFoundError

        raise NotFoundError(f"The DAG {dag_id!r} has no runs yet; `dflow dags trigger {dag_id}` makes one.")
    return newest[0]


def task_rows(tx: Tx, run: Run) -> list[dict[str, Any]]:
    """Return what a listing says of a run's task instances, in an order in which they could run."""
    from dflow.core.graph import Graph
    from dflow.store import dags, tasks

    position = Graph(dags.get_spec(tx, run.dag_version_id)).position
    found = tasks.list_for_run(tx, run.id)
    return [_task_row(ti) for ti in sorted(found, key=lambda ti: position.get(ti.task_id, len(position)))]


def _task_row(ti: TaskInstance) -> dict[str, Any]:
    return {
        "task_id": ti.task_id,
        "map_index": ti.map_index if ti.map_index >= 0 else None,
        "state": ti.state,
        "try_number": ti.try_number,
        "retries": ti.retries,
        "user_failures": ti.user_failures,
        "infra_failures": ti.infra_failures,
        "queue": ti.queue,
        "pool": ti.pool,
        "not_before": ti.not_before,
        "started_at": ti.started_at,
        "ended_at": ti.ended_at,
        "duration_seconds": round((ti.ended_at - ti.started_at).total_seconds(), 3)
        if ti.started_at and ti.ended_at
        else None,
        "hostname": ti.hostname,
        "reason": ti.reason,
        "cause": ti.cause,
    }


def ring(settings: Settings) -> None:
    """Wake the schedulers, so that nobody waits for their next poll; harmless when nobody hears it."""
    from dflow.broker.doorbell import doorbell_for

    doorbell = doorbell_for(settings)
    doorbell.ring()
    doorbell.close()

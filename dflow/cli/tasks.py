"""`dflow tasks`: the tasks of a DAG, and what became of them in a run: states, logs, tries, history."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dflow.cli.output import Output, OutputOption, show_list
from dflow.cli.runs import DagId, RunId, find_run, task_rows
from dflow.cli.session import open_store, transaction

app = typer.Typer(no_args_is_help=True, help="Tasks, and what became of them in a run.")

TaskId = Annotated[str, typer.Argument(metavar="TASK", help="The task.")]
MapIndex = Annotated[int, typer.Option(min=-1, help="Which instance of a mapped task.")]

_LIST = ("task_id", "operator", "upstream", "trigger_rule", "retries", "pool", "queue", "owner")
_STATES = (
    "task_id",
    "map_index",
    "state",
    "try_number",
    "retries",
    "started_at",
    "duration_seconds",
    "reason",
    "cause",
)
_ATTEMPTS = (
    *("try_number", "state", "reason", "cause", "exit_code", "peak_rss_bytes", "hostname", "pid"),
    *("queued_at", "started_at", "ended_at", "id"),
)
_EVENTS = ("at", "from_state", "to_state", "reason", "actor", "cause", "attempt_id")
# What a table has no room for.
_DETAILS = frozenset({"peak_rss_bytes", "queued_at", "id", "attempt_id"})


@app.command("list")
def list_tasks(dag_id: DagId, output: OutputOption = Output.TABLE) -> None:
    """List the tasks of a DAG as it is now."""
    from dflow.core.graph import Graph
    from dflow.store import dags

    with transaction() as tx:
        spec = dags.current(tx, dag_id).spec
    graph = Graph(spec)
    rows = [
        {
            "task_id": task.task_id,
            "operator": task.operator,
            "upstream": list(task.upstream),
            "trigger_rule": task.trigger_rule,
            "retries": task.retries,
            "pool": task.pool,
            "queue": task.queue,
            "owner": task.owner,
        }
        for task in (graph.tasks[task_id] for task_id in graph.order)
    ]
    show_list(rows, output, columns=_LIST, empty="The DAG has no tasks.")


@app.command()
def states(dag_id: DagId, run_id: RunId, output: OutputOption = Output.TABLE) -> None:
    """List the task instances of a run with their states."""
    with transaction() as tx:
        rows = task_rows(tx, find_run(tx, dag_id, run_id))
    show_list(rows, output, columns=_STATES, empty="The run has no tasks.")


@app.command()
def attempts(
    dag_id: DagId, run_id: RunId, task_id: TaskId, map_index: MapIndex = -1, output: OutputOption = Output.TABLE
) -> None:
    """List the tries of a task instance: where each ran, how it ended and why."""
    from dflow.store import attempts as store_attempts
    from dflow.store import tasks

    with transaction() as tx:
        ti = tasks.get(tx, dag_id, find_run(tx, dag_id, run_id).run_id, task_id, map_index)
        rows = [asdict(attempt) for attempt in store_attempts.list_for_ti(tx, ti.id)]
    show_list(rows, output, columns=_for(output, _ATTEMPTS), empty="It has not started yet.")


@app.command()
def events(
    dag_id: DagId, run_id: RunId, task_id: TaskId, map_index: MapIndex = -1, output: OutputOption = Output.TABLE
) -> None:
    """List every change of state of a task instance: when, from what to what, who did it and why."""
    from dflow.store import events as store_events
    from dflow.store import tasks

    with transaction() as tx:
        ti = tasks.get(tx, dag_id, find_run(tx, dag_id, run_id).run_id, task_id, map_index)
        rows = [asdict(event) for event in store_events.list_for_ti(tx, ti.id)]
    show_list(rows, output, columns=_for(output, _EVENTS), empty="Nothing has happened to it yet.")


@app.command(epilog="Example: dflow tasks logs tz_report latest aggregate --follow")
def logs(
    dag_id: DagId,
    run_id: RunId,
    task_id: TaskId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the task has ended, over retries.")
    ] = False,
    try_number: Annotated[int | None, typer.Option("--try", min=1, help="This try instead of the latest.")] = None,
    map_index: MapIndex = -1,
    raw: Annotated[
        bool, typer.Option("--raw", help="Only what the task wrote, without time, level and source.")
    ] = False,
) -> None:
    """Print the log of a task instance, also while it runs."""
    from dflow.cli.task_log import LogPrinter
    from dflow.store import tasks

    with open_store() as store:
        ti = store.run(lambda tx: tasks.get(tx, dag_id, find_run(tx, dag_id, run_id).run_id, task_id, map_index))
        printer = LogPrinter(store, ti.id, is_raw=raw)
        if follow:
            printer.follow(try_number)
        else:
            printer.print_try(try_number)


def _for(output: Output, columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in columns if output is not Output.TABLE or name not in _DETAILS)

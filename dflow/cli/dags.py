"""`dflow dags`: list, look at, trigger, pause and test DAGs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dflow.cli.conf import check_conf, parse_conf, parse_instant
from dflow.cli.output import Output, OutputOption, note, show_list, show_record, warn, write
from dflow.cli.runs import DagId, ring
from dflow.cli.session import load_settings, open_store, transaction, user
from dflow.cli.watch import summary, watch
from dflow.core.errors import NotFoundError

if TYPE_CHECKING:
    from dflow.core.spec import DagSpec
    from dflow.core.timetable import DueRun
    from dflow.settings import Settings
    from dflow.store.engine import Store, Tx
    from dflow.store.runs import Run

app = typer.Typer(no_args_is_help=True, help="List, look at, trigger, pause and test DAGs.")

_LIST = ("dag_id", "is_paused", "schedule", "next_run_after", "owners", "tags", "path")
_NO_DATE = "none"
Conf = Annotated[str | None, typer.Option(metavar="JSON", help="The run's conf: JSON, @FILE, or - for standard input.")]


@app.command("list")
def list_dags(
    all_: Annotated[bool, typer.Option("--all", help="Also those whose file is gone.")] = False,
    tag: Annotated[str | None, typer.Option(help="Only those with this tag.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the DAGs."""
    from dflow.store import dags, import_errors

    with transaction() as tx:
        found = dags.list_(tx, active_only=not all_, tag=tag)
        broken = len(import_errors.list_(tx))
    rows = [
        {
            "dag_id": dag.dag_id,
            "is_paused": dag.is_paused,
            "schedule": dag.schedule_summary,
            "next_run_after": dag.next_run_after,
            "owners": dag.owners,
            "tags": dag.tags,
            "path": dag.path,
            "is_active": dag.is_active,
        }
        for dag in found
    ]
    show_list(rows, output, columns=(*_LIST, "is_active") if all_ else _LIST, empty="No DAGs.")
    if broken:
        warn(f"{broken} file{'s' if broken > 1 else ''} could not be read: `dflow dags list-import-errors`.")


@app.command()
def details(dag_id: DagId, output: OutputOption = Output.TABLE) -> None:
    """Show all there is to know about a DAG."""
    from dflow.store import dags

    with transaction() as tx:
        dag = dags.get(tx, dag_id)
        spec = dags.current(tx, dag_id).spec
        versions = dags.versions(tx, dag_id)
    record = asdict(dag) | {
        "version_number": versions[0].number if versions else None,
        "versions": len(versions),
        "tasks": len(spec.tasks),
        "schedule": asdict(spec.schedule),
        "start_date": spec.start_date,
        "end_date": spec.end_date,
        "catchup": spec.catchup,
        "max_active_tasks": spec.max_active_tasks,
        "dagrun_timeout_seconds": spec.dagrun_timeout_seconds,
        "params": spec.params,
        "doc_md": spec.doc_md,
    }
    is_for_programs = output in {Output.JSON, Output.YAML}
    show_record({k: v for k, v in record.items() if is_for_programs or v not in (None, [], {})}, output)


@app.command(epilog="Example: dflow dags trigger tz_report --conf '{\"from_year\": 2000}' --wait")
def trigger(
    dag_id: DagId,
    conf: Conf = None,
    run_id: Annotated[str | None, typer.Option(help="The run's id; else made of the time.")] = None,
    logical_date: Annotated[
        str | None, typer.Option(metavar="DATE", help="ISO 8601; else now. `none` gives the run no logical date.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, showing how it goes.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="With --wait: at most so many seconds.")] = None,
    unpause: Annotated[bool, typer.Option("--unpause", help="Unpause the DAG first.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a run of a DAG. With --wait the exit code is 0 for success, 1 for failure, 124 when it is not in time."""
    if timeout is not None and not wait:
        raise typer.BadParameter("only together with --wait", param_hint="--timeout")
    settings = load_settings()
    values = parse_conf(conf)
    now = datetime.now(UTC)
    date = _logical_date(logical_date, now, settings.core.default_timezone)
    with open_store(settings) as store:
        run = _trigger(settings, store, dag_id, run_id=run_id, date=date, now=now, conf=values, unpause=unpause)
        ring(settings)
        if wait:
            note(f"Triggered {dag_id}: run {run.run_id}")
            watch(settings, store, dag_id, run.run_id, timeout_seconds=timeout, form=output)
    record = summary(run)
    show_record(record if output is not Output.TABLE else {k: v for k, v in record.items() if v is not None}, output)


@app.command()
def pause(dag_ids: Annotated[list[str], typer.Argument(metavar="DAG", help="The DAGs.")]) -> None:
    """Pause DAGs: no new runs are made or started, and running ones start no further tasks."""
    _set_paused(dag_ids, paused=True)


@app.command()
def unpause(dag_ids: Annotated[list[str], typer.Argument(metavar="DAG", help="The DAGs.")]) -> None:
    """Let paused DAGs run again."""
    _set_paused(dag_ids, paused=False)


@app.command("test", epilog='Example: dflow dags test dags/etl.py --conf \'{"day": "2026-11-22"}\'')
def run_test(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="The DAG file.")],
    dag_id: Annotated[str | None, typer.Option(help="Which DAG, when the file has several.")] = None,
    conf: Conf = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Run a DAG of a file in this process, with no service at all. The exit code is 0 when it succeeds, else 1."""
    from dflow.cli.dag_test import run_file

    raise typer.Exit(run_file(file, dag_id, parse_conf(conf), output))


@app.command("list-import-errors")
def list_import_errors(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the file, and how it came to it.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the DAG files that could not be read. The exit code is 1 when there are any."""
    from dflow.store import import_errors

    with transaction() as tx:
        rows = [asdict(error) for error in import_errors.list_(tx)]
    columns = ["bundle_name", "path", "message", "created_at", *(["traceback"] if traceback else [])]
    if traceback and output is Output.TABLE:
        write("".join(f"{row['path']}\n{row['traceback'].rstrip()}\n\n" for row in rows))
    else:
        show_list(rows, output, columns=columns, empty="All DAG files could be read.")
    if rows:
        raise typer.Exit(1)


@app.command("next-runs", epilog="Example: dflow dags next-runs example_schedule_time_zone -n 5")
def next_runs(
    dag_id: DagId,
    number: Annotated[int, typer.Option("--number", "-n", min=1, max=10_000, help="How many.")] = 5,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show when a DAG runs next by its schedule."""
    from dflow.store import dags

    with transaction() as tx:
        dag = dags.get(tx, dag_id)
        spec = dags.current(tx, dag_id).spec
    rows = _upcoming(spec, dag.next_run, number)
    show_list(
        rows,
        output,
        columns=("logical_date", "data_interval_start", "data_interval_end", "run_after"),
        empty=f"The DAG {dag_id} never runs by itself (schedule: {spec.schedule.summary}).",
    )
    if dag.is_paused and rows:
        warn(f"The DAG is paused; nothing of this happens until `dflow dags unpause {dag_id}`.")


@app.command()
def code(dag_id: DagId) -> None:
    """Print the source of a DAG's file, as stored with its current version."""
    from dflow.store import dags

    with transaction() as tx:
        source = dags.get_code(tx, dags.current(tx, dag_id).version_id)
    if source is None:
        raise NotFoundError(f"No source of {dag_id!r} is kept; the setting core.store_dag_code decides that.")
    write(source.source if source.source.endswith("\n") else f"{source.source}\n")


@app.command()
def reserialize() -> None:
    """Read all changed DAG files once, now, without the dag-processor. The exit code is 1 when one cannot be read."""
    from dflow.services.dag_processor import DagProcessor

    settings = load_settings()
    total: Counter[str] = Counter()
    with open_store(settings, pool_size=2) as store:
        processor = DagProcessor(store, settings)
        while True:
            counts = Counter(processor.run_once())
            is_done = not counts["pending"] and not counts["locked"]  # locked: a dag-processor is at it
            total += counts
            if is_done:
                break
            processor.wait(counts)
    for name in ("pending", "locked"):
        del total[name]
    note(", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in total.items()) or "Nothing has changed.")
    if total["failed"]:
        raise typer.Exit(1)


def _trigger(
    settings: Settings,
    store: Store,
    dag_id: str,
    *,
    run_id: str | None,
    date: datetime | None,
    now: datetime,
    conf: dict[str, Any],
    unpause: bool,
) -> Run:
    from dflow.cli.liveness import problems_of
    from dflow.core.states import RunType
    from dflow.store import dags, runs

    def create(tx: Tx) -> tuple[Run, list[str]]:
        spec = dags.current(tx, dag_id).spec
        check_conf(spec.params, conf, overrides=settings.core.dag_run_conf_overrides_params)
        if unpause:
            dags.set_paused(tx, [dag_id], False)
        run = runs.create(
            tx,
            dag_id=dag_id,
            run_id=run_id,
            run_type=RunType.MANUAL,
            logical_date=date,
            data_interval_start=date,
            data_interval_end=date,
            run_after=now,
            conf=conf,
            triggered_by=f"user {user()}",
        )
        return run, problems_of(tx, settings, dag_id)

    run, problems = store.run(create)
    for problem in problems:
        warn(problem)
    return run


def _logical_date(text: str | None, now: datetime, timezone: str) -> datetime | None:
    if text is None:
        return now
    return None if text.lower() == _NO_DATE else parse_instant(text, timezone)


def _set_paused(dag_ids: list[str], *, paused: bool) -> None:
    from dflow.store import dags

    settings = load_settings()
    with open_store(settings) as store:
        changed = store.run(lambda tx: dags.set_paused(tx, dag_ids, paused))
    if changed and not paused:
        ring(settings)
    state = "paused" if paused else "unpaused"
    for dag_id in dag_ids:
        note(f"{dag_id} is {state if dag_id in changed else f'{state} already'}.")


def _upcoming(spec: DagSpec, first: DueRun | None, number: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    now = datetime.now(UTC)
    due = first or _first(spec, now)
    while due is not None and len(rows) < number:
        rows.append(
            {
                "logical_date": due.logical_date,
                "data_interval_start": due.interval_start,
                "data_interval_end": due.interval_end,
                "run_after": due.run_after,
            }
        )
        if spec.schedule.kind == "continuous":  # the next one is due when this one has ended
            break
        due = _after(spec, due, max(now, due.run_after))
    return rows


def _first(spec: DagSpec, now: datetime) -> DueRun | None:
    """What is due first when the row does not know (yet); a DAG of one run may have had it."""
    return _after(spec, None, now) if spec.schedule.kind in {"cron", "delta"} else None


def _after(spec: DagSpec, last: DueRun | None, now: datetime) -> DueRun | None:
    from dflow.core.timetable import next_run

    return next_run(
        spec.schedule, last=last, start_date=spec.start_date, end_date=spec.end_date, catchup=spec.catchup, now=now
    )

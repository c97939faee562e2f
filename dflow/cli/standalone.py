"""`dflow standalone`: the whole system on this machine with one command; see `dflow.standalone`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from dflow.settings import Settings, load
from dflow.standalone.display import Display
from dflow.standalone.supervisor import Supervisor, plan


def app_command(
    workers: Annotated[int, typer.Option(min=1, help="How many Celery workers to start.")] = 2,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="How many tasks each worker (or the LocalExecutor) runs at once.", show_default="4"),
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(help="CeleryExecutor, LocalExecutor or SequentialExecutor; the last two need no Redis."),
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Use this Postgres instead of an embedded one.")
    ] = None,
    broker_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Use this Redis instead of an embedded one.")
    ] = None,
    flower_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Where Flower listens.", show_default="5555, or the next free one"),
    ] = None,
    flower: Annotated[bool, typer.Option(help="Start Flower, the monitor of the Celery workers.")] = True,
) -> None:
    """Start Postgres, Redis, dag-processor, scheduler, workers and Flower on this machine, and show what runs.

    Everything is kept in $DFLOW_HOME (~/.dflow), reachable by you on this machine only. Other commands find it by that.
    Ctrl-C finishes running tasks and stops everything; the next start goes on where this one was.

    Examples:

      dflow standalone

      dflow standalone --workers 4 --concurrency 8

      dflow standalone --executor LocalExecutor

      dflow standalone --database-url postgresql://me@db/dflow --broker-url redis://cache:6379/0
    """
    settings = _with_options(
        load(),
        {
            "core.executor": executor,
            "database.sql_alchemy_conn": database_url,
            "celery.broker_url": broker_url,
            "celery.flower_port": flower_port,
        },
    )
    settings = _with_concurrency(settings, concurrency)
    Supervisor(plan(settings, workers=workers, flower=flower), Display(Console())).run()


def _with_options(settings: Settings, options: dict[str, str | int | None]) -> Settings:
    given = {name: value for name, value in options.items() if value is not None}
    return settings.with_values(dict(given), source="option of `dflow standalone`") if given else settings


def _with_concurrency(settings: Settings, concurrency: int | None) -> Settings:
    """One option for whatever runs the tasks; a small default, because everything shares this machine."""
    name = "celery.worker_concurrency" if settings.core.executor == "CeleryExecutor" else "core.parallelism"
    section, key = name.split(".")
    if concurrency is None:
        if settings.explain(section, key).winner.step != 5:
            return settings
        concurrency = 4
    return settings.with_values({name: concurrency}, source="option --concurrency of `dflow standalone`")

"""`dflow scheduler | dag-processor | worker | flower`: the long-running processes, each in the foreground.

Every one gets resolved settings, so no command of a ``_CMD`` setting runs twice. Worker and Flower *become* Celery
(exec): signals, exit codes and process titles are those of a stock Celery process.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from dflow.cli.output import note, warn
from dflow.cli.session import load_settings
from dflow.settings import Settings

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def scheduler() -> None:
    """Run a scheduler until SIGTERM or Ctrl-C. Several may run side by side, on any machines."""
    settings = load_settings()
    _log_as(settings, "scheduler")
    from dflow.services.scheduler import main

    raise typer.Exit(main(settings))


def dag_processor() -> None:
    """Run a dag-processor until SIGTERM or Ctrl-C. It alone needs the DAG folder."""
    settings = load_settings()
    _log_as(settings, "dag-processor")
    from dflow.services.dag_processor import main

    raise typer.Exit(main(settings))


def worker(
    context: typer.Context,
    queues: Annotated[str | None, typer.Option("--queues", "-q", "-Q", help="Queues to consume, by comma.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", "-c", min=1, help="Tasks at once.")] = None,
    autoscale: Annotated[
        str | None, typer.Option(metavar="MAX,MIN", help="Grow and shrink between these numbers of processes.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="The node's name; %h is the host's name.")] = None,
    loglevel: Annotated[str | None, typer.Option("--loglevel", "-l", help="The least severe level to log.")] = None,
) -> None:
    """Become a Celery worker. Further arguments go on to `celery worker` as they are."""
    settings = load_settings()
    if settings.core.executor != "CeleryExecutor":
        warn(f"core.executor is {settings.core.executor}: the scheduler will not send anything to this worker.")
    options = {
        "--queues": queues,
        "--concurrency": None if concurrency is None else str(concurrency),
        "--autoscale": autoscale,
        "--hostname": _node_name(name),
        "--loglevel": loglevel or settings.logging.logging_level,
    }
    given = [f"{option}={value}" for option, value in options.items() if value is not None]
    _become_celery(settings, ["worker", *given, *context.args], {})


def flower(context: typer.Context) -> None:
    """Become Flower, the monitor of Celery. Further arguments go on to `celery flower` as they are."""
    settings = load_settings()
    celery = settings.celery
    arguments = [f"--address={celery.flower_host}", f"--port={celery.flower_port}"]
    if celery.flower_url_prefix:
        arguments.append(f"--url_prefix={celery.flower_url_prefix.strip('/')}")
    # The password goes by the environment: everybody on the machine can read arguments.
    auth = {"FLOWER_BASIC_AUTH": celery.flower_basic_auth} if celery.flower_basic_auth else {}
    if not auth and celery.flower_host not in {"127.0.0.1", "::1", "localhost"}:
        warn("Flower will be open to everybody who can reach it; set celery.flower_basic_auth.")
    elif not auth:
        note("Flower's API (/api/...) answers only with a login; to use it, set celery.flower_basic_auth.")
    note(f"Flower: http://{celery.flower_host}:{celery.flower_port}{_path(celery.flower_url_prefix)}")
    _become_celery(settings, ["flower", *arguments, *context.args], auth)


def _become_celery(settings: Settings, arguments: list[str], extra_env: dict[str, str]) -> NoReturn:
    env = {**os.environ, **settings.as_env(), **extra_env}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(sys.executable, [sys.executable, "-m", "celery", "-A", "worker", *arguments], env)  # noqa: S606


def _log_as(settings: Settings, component: str) -> None:
    from dflow.telemetry.logging import configure

    configure(settings, component)


def _node_name(name: str | None) -> str | None:
    """Celery wants name@host; people give a name."""
    return None if name is None else name if "@" in name else f"{name}@%h"


def _path(prefix: str) -> str:
    return f"/{prefix.strip('/')}" if prefix.strip("/") else ""

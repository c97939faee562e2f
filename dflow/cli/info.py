"""`dflow info`: what is installed, where everything is, and what is reachable and alive right now. Shows no secrets."""

from __future__ import annotations

import platform
import socket
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from dflow.cli.output import Output, OutputOption, out, show_list, show_record, write
from dflow.cli.session import load_settings, open_store
from dflow.core.errors import DflowError

if TYPE_CHECKING:
    from dflow.settings import Settings
    from dflow.store.engine import Store

_PACKAGES: Final = ("celery", "kombu", "redis", "SQLAlchemy", "psycopg2-binary", "flower", "alembic", "typer", "rich")
_SERVICES: Final = ("kind", "hostname", "pid", "version", "started_at", "heartbeat_age_seconds", "health_url")
_WORKERS: Final = ("name", "state", "executor", "queues", "running", "concurrency", "claimed", "hostname", "health_url")


def info(output: OutputOption = Output.TABLE) -> None:
    """Show versions, paths, addresses, what answers, and the live services and workers."""
    settings = load_settings()
    general = _general(settings)
    general |= {"broker": _broker(settings)}
    database, services, workers = _database(settings)
    general |= {"database": database}
    if output in {Output.JSON, Output.YAML}:
        show_record(general | {"services": services, "workers": workers}, output)
        return
    show_record(general, output)
    for title, rows, columns in (("Services", services, _SERVICES), ("Workers", workers, _WORKERS)):
        write("\n")
        out().print(title, style="bold")
        if rows:
            show_list(rows, output, columns=columns)
        else:
            write("None is alive.\n")


def _general(settings: Settings) -> dict[str, Any]:
    import dflow

    return {
        "dflow": dflow.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "home": str(settings.home),
        "config_file": f"{settings.config_file}{'' if settings.config_file.exists() else ' (not there)'}",
        "dags_folder": f"{settings.core.dags_folder}{'' if settings.core.dags_folder.is_dir() else ' (not there)'}",
        "executor": settings.core.executor,
        "database_url": settings.explain("database", "sql_alchemy_conn").shown,
        "broker_url": settings.explain("celery", "broker_url").shown,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _broker(settings: Settings) -> str:
    if settings.core.executor != "CeleryExecutor":
        return f"not needed by the {settings.core.executor}"
    from dflow.broker.ping import ping

    try:
        ping(settings)
    except DflowError as error:
        return f"away: {_first_line(error)}"
    return "answers"


def _database(settings: Settings) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """A database that is away is a fact to be shown here, not an error."""
    try:
        with open_store(settings) as store:
            return _described(store), _services(store, settings), _workers(store)
    except DflowError as error:
        return f"away: {_first_line(error)}", [], []


def _described(store: Store) -> str:
    from dflow.store import schema

    schema.check(store)
    return f"answers, schema at revision {schema.current(store)}"


def _services(store: Store, settings: Settings) -> list[dict[str, Any]]:
    from dflow.store import services

    threshold = settings.scheduler.health_check_threshold
    found = store.run(lambda tx: services.list_live(tx, within_seconds=threshold))
    now = datetime.now(UTC)
    return [
        {name: getattr(one, name, None) for name in _SERVICES}
        | {"heartbeat_age_seconds": round(max(0.0, (now - one.heartbeat_at).total_seconds()), 1)}
        for one in found
    ]


def _workers(store: Store) -> list[dict[str, Any]]:
    from dflow.store import workers

    found = store.run(workers.list_live)
    return [{name: getattr(one.worker, name, None) for name in _WORKERS} | {"running": one.running} for one in found]


def _first_line(error: DflowError) -> str:
    return str(error).splitlines()[0]

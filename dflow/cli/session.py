"""What a command starts from: the settings, the database behind them, and the global flags.

An empty address in the settings means the servers that `dflow standalone` keeps in the home, so that a second terminal
with the same home needs no setting at all. Heavy modules are imported when a command needs them, not before.
"""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dflow.settings import Settings
    from dflow.store.engine import Store

EMBEDDED_SOURCE = "the servers of `dflow standalone` in this home"


@dataclass(slots=True)
class Flags:
    """The global options; set once, before a command runs."""

    debug: bool = False


flags = Flags()


def load_settings() -> Settings:
    """Return the settings, with the addresses of the embedded servers where none are set. Raises SettingsError."""
    from dflow.settings import load

    return with_embedded_addresses(load())


def with_embedded_addresses(settings: Settings) -> Settings:
    """Return the settings with empty addresses filled by those of the home's embedded servers."""
    if settings.database.sql_alchemy_conn and settings.celery.broker_url:
        return settings
    from dflow.standalone.attach import attach

    return attach(settings, source=EMBEDDED_SOURCE)


def is_embedded(settings: Settings) -> bool:
    """Return whether the database is the one `dflow standalone` keeps in the home."""
    return settings.explain("database", "sql_alchemy_conn").winner.source == EMBEDDED_SOURCE


@contextmanager
def open_store(settings: Settings | None = None) -> Iterator[Store]:
    """Give the store for the length of one command.

    Raises StoreUnavailableError at once when it would be the embedded one and that does not run.
    """
    settings = settings or load_settings()
    require_running(settings)
    from dflow.store.engine import Store

    store = Store.from_settings(settings, "cli", pool_size=1)
    try:
        yield store
    finally:
        store.close()


def require_running(settings: Settings) -> None:
    """Raise StoreUnavailableError with what to do when the embedded Postgres is meant and is not there."""
    if not is_embedded(settings):
        return
    from dflow.core.errors import StoreUnavailableError
    from dflow.embedded import is_running

    if not is_running(settings.home):
        raise StoreUnavailableError(
            f"No database: `dflow standalone` does not run with the home {settings.home}, and no other server is set.\n"
            "Start `dflow standalone` in another terminal, or set DFLOW__DATABASE__SQL_ALCHEMY_CONN "
            "(DFLOW_HOME chooses another home)."
        )


def actor() -> str:
    """Return who acts, as events record it: ``user ann (cli)``."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        import os

        name = f"uid {os.getuid()}"
    return f"user {name} (cli)"

"""What a command starts from: the settings, the database behind them, and the global flags.

Where no address is set, the servers of the `dflow standalone` of the same home are meant, so that a second terminal
needs no setting at all. Heavy modules are imported when a command needs them, not before.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from dflow.settings import Settings
    from dflow.store.engine import Store, Tx


@dataclass(slots=True)
class Flags:
    """The global options; set once, before a command runs."""

    debug: bool = False


flags = Flags()

STANDALONE_SOURCE: Final = "the `dflow standalone` of this home"


def load_settings() -> Settings:
    """Return the settings, with the addresses of the home's `dflow standalone` where none are set."""
    from dflow.settings import load
    from dflow.standalone.attach import attach

    return attach(load(), source=STANDALONE_SOURCE)


def require_running(settings: Settings) -> None:
    """Raise StoreUnavailableError with what to do when the database of `dflow standalone` is meant and not there."""
    if settings.explain("database", "sql_alchemy_conn").winner.source != STANDALONE_SOURCE:
        return
    from dflow.core.errors import StoreUnavailableError
    from dflow.embedded import is_running, urls

    if settings.database.sql_alchemy_conn == urls(settings.home)[0] and not is_running(settings.home):
        raise StoreUnavailableError(
            f"No database: none is set, and no `dflow standalone` runs with the home {settings.home}.\n"
            "Start `dflow standalone` in another terminal, name its home in DFLOW_HOME, or set "
            "DFLOW__DATABASE__SQL_ALCHEMY_CONN to use another Postgres."
        )


@contextmanager
def open_store(settings: Settings | None = None, *, pool_size: int = 1) -> Iterator[Store]:
    """Give the store for the length of one command. Raises StoreUnavailableError when no database can be meant."""
    from dflow.store.engine import Store

    settings = settings or load_settings()
    require_running(settings)
    store = Store.from_settings(settings, "cli", pool_size=pool_size)
    try:
        yield store
    except Exception as error:
        _explain_missing_schema(store, error)
        raise
    finally:
        store.close()


@contextmanager
def transaction() -> Iterator[Tx]:
    """Give one transaction, for commands that need nothing else."""
    with open_store() as store, store.begin() as tx:
        yield tx


def user() -> str:
    """Return who acts, as events record it: ``ann (cli)``."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        name = f"uid {os.getuid()}"
    return f"{name} (cli)"


def _explain_missing_schema(store: Store, error: Exception) -> None:
    """A statement that failed in a database without our schema, or with an old one, is best told as just that."""
    if getattr(error, "orig", None) is None:  # not an error of the database driver
        return
    from dflow.core.errors import StoreUnavailableError
    from dflow.store import schema

    try:
        schema.check(store)
    except StoreUnavailableError:
        return

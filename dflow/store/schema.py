"""The schema of the database: bringing it up to date, checking it, taking it back.

Promises: a migration happens whole or not at all (Postgres DDL is transactional); of several processes that migrate at
once, one does and the others find it done (advisory lock); a migration that would have to wait long for a table in use
gives up and says so, rather than make everybody else queue behind it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from dflow.core.errors import SchemaError
from dflow.store.engine import Store

MIGRATION_LOCK: Final = 0x6D696772  # "migr": the advisory lock key all migrating processes share
_MIGRATION_WAIT_SECONDS: Final = 60
_TABLE_WAIT_SECONDS: Final = 10


def migrate(store: Store) -> str:
    """Bring the schema to the newest revision and return it; nothing happens when it is there already.

    Waits for another process that migrates. Raises SchemaError when the database is newer than this dflow, or a table
    stays in use for too long.
    """
    with _migrating(store) as tx:
        _refuse_newer(current_revision(tx))
        command.upgrade(_config(tx), "head")
    return newest()


def check(store: Store) -> None:
    """Raise SchemaError, with what to do, unless the schema is exactly the one this dflow works with."""
    with store.begin() as tx:
        revision = current_revision(tx)
    _refuse_newer(revision)
    if revision is None:
        raise SchemaError(f"The database {store.address} has no dflow schema yet. Run `dflow db migrate`.")
    if revision != newest():
        raise SchemaError(
            f"The schema of {store.address} is at revision {revision}, this dflow needs {newest()}. "
            "Run `dflow db migrate`."
        )


def current(store: Store) -> str | None:
    """Return the revision of the schema, or None for a database without one."""
    with store.begin() as tx:
        return current_revision(tx)


def newest() -> str:
    """Return the revision this dflow works with."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "there is always a first revision"
    return head


def downgrade(store: Store, revision: str) -> None:
    """Take the schema back to an older revision (``base``: to nothing at all). Data of what is dropped is lost.

    Raises SchemaError for a revision that is unknown.
    """
    if revision != "base" and revision not in _known():
        raise SchemaError(f"There is no schema revision {revision!r}; known: base, {', '.join(sorted(_known()))}.")
    with _migrating(store) as tx:
        _refuse_newer(current_revision(tx))
        command.downgrade(_config(tx), revision)


def reset(store: Store) -> None:
    """Drop everything dflow has in the database and make the schema anew, in one transaction. All data is lost."""
    with _migrating(store) as tx:
        _refuse_newer(current_revision(tx))
        command.downgrade(_config(tx), "base")
        command.upgrade(_config(tx), "head")


def sql(from_revision: str | None = None, to_revision: str = "head") -> str:
    """Return the SQL of a migration, to be reviewed or run by hand; needs no database.

    From ``from_revision`` (None: from an empty database) to ``to_revision``. Raises SchemaError for unknown ones.
    """
    for revision in (from_revision, to_revision):
        if revision not in {None, "base", "head", *_known()}:
            raise SchemaError(f"There is no schema revision {revision!r}; known: {', '.join(sorted(_known()))}.")
    config = _config()
    config.output_buffer = io.StringIO()
    command.upgrade(config, f"{from_revision}:{to_revision}" if from_revision else to_revision, sql=True)
    return config.output_buffer.getvalue()


def current_revision(tx: Connection) -> str | None:
    """Return the revision of the schema as this transaction sees it."""
    return MigrationContext.configure(tx).get_current_revision()


@contextmanager
def _migrating(store: Store) -> Iterator[Connection]:
    """Open a transaction in which nobody else migrates."""
    with store.begin() as tx:
        # A migration may take as long as it takes; waiting for a lock may not.
        tx.execute(text("SELECT set_config('statement_timeout', '0', true)"))
        with _waiting(tx, _MIGRATION_WAIT_SECONDS, "Another process migrates the database"):
            tx.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        with _waiting(tx, _TABLE_WAIT_SECONDS, "A table is in use; stop the other components"):
            yield tx


@contextmanager
def _waiting(tx: Connection, seconds: int, reason: str) -> Iterator[None]:
    """Let no lock be waited for longer than ``seconds``; SchemaError with the reason when one would be."""
    tx.execute(text("SELECT set_config('lock_timeout', :value, true)"), {"value": f"{seconds}s"})
    try:
        yield
    except OperationalError as error:
        if getattr(error.orig, "pgcode", None) != "55P03":  # lock_not_available
            raise
        raise SchemaError(f"{reason}. Gave up after {seconds} s and changed nothing; try again.") from error


def _refuse_newer(revision: str | None) -> None:
    if revision is not None and revision not in _known():
        raise SchemaError(
            f"The database schema is at revision {revision}, which this dflow does not know: it was made by a newer "
            "one. Upgrade dflow."
        )


def _known() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _config(tx: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = tx
    return config

"""`dflow db`: the schema of the database. What loses data asks first, or wants `--yes`."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from dflow.cli.output import note, write
from dflow.cli.session import load_settings, open_store

app = typer.Typer(no_args_is_help=True, help="The schema of the database.")

_RETRY_SECONDS = 0.5
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command()
def migrate() -> None:
    """Bring the schema up to date. Safe when several do it at once, and when nothing is to be done."""
    from dflow.store import schema

    with open_store() as store:
        before = schema.current(store)
        after = schema.migrate(store)
    note(f"The schema is at revision {after}{' already' if before == after else ''}.")


@app.command(epilog="Example: dflow db check --wait 60 && dflow scheduler")
def check(
    wait: Annotated[float, typer.Option(min=0, help="Wait up to so many seconds for it to become right.")] = 0,
) -> None:
    """Check that the database is reachable and has the schema this dflow needs."""
    from dflow.core.errors import SchemaError, StoreUnavailableError
    from dflow.store import schema

    deadline = time.monotonic() + wait
    while True:
        try:
            with open_store() as store:
                schema.check(store)
            break
        except (StoreUnavailableError, SchemaError):
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise
            time.sleep(_RETRY_SECONDS)
    note(f"The database is there, at revision {schema.newest()}.")


@app.command()
def current() -> None:
    """Print the revision of the schema; nothing for a database without one."""
    from dflow.store import schema

    with open_store() as store:
        revision = schema.current(store)
    write(f"{revision}\n" if revision else "")
    if revision is None:
        note("The database has no dflow schema yet; `dflow db migrate` makes it.")


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(metavar="REVISION", help="The older revision; base removes everything.")],
    yes: Yes = False,
) -> None:
    """Take the schema back to an older revision. Data of what is dropped is lost."""
    from dflow.store import schema

    settings = load_settings()
    with open_store(settings) as store:
        _confirm(f"Take the schema of {store.address} back to {revision}, losing what newer ones added?", yes)
        schema.downgrade(store, revision)
        note(f"The schema is at revision {schema.current(store) or 'base'}.")


@app.command()
def reset(yes: Yes = False) -> None:
    """Drop all tables of dflow and make them anew. Every DAG, run and log is lost."""
    from dflow.store import schema

    with open_store() as store:
        _confirm(f"Delete everything dflow has in {store.address}?", yes)
        schema.reset(store)
    note("The database is empty again.")


@app.command(epilog="Example: dflow db sql --from 0001 > upgrade.sql")
def sql(
    from_revision: Annotated[
        str | None, typer.Option("--from", help="The revision to start from; else an empty database.")
    ] = None,
    to_revision: Annotated[str, typer.Option("--to", help="The revision to arrive at.")] = "head",
) -> None:
    """Print the SQL of a migration, to be reviewed or run by hand. Needs no database."""
    from dflow.store import schema

    write(schema.sql(from_revision, to_revision))


def _confirm(question: str, is_sure: bool) -> None:
    from dflow.core.errors import ConflictError

    if is_sure:
        return
    if not sys.stdin.isatty():
        raise ConflictError(f"{question} Add --yes to say so; there is no terminal to ask on.")
    typer.confirm(question, abort=True, err=True)

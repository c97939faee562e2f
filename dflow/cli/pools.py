"""`dflow pools`: limits on how many tasks of a kind run at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dflow.cli.output import Output, OutputOption, note, show_list, show_record
from dflow.cli.session import transaction

if TYPE_CHECKING:
    from dflow.store.pools import Pool, PoolUsage

app = typer.Typer(no_args_is_help=True, help="Limits on how many tasks of a kind run at once.")

_COLUMNS = ("name", "slots", "running", "queued", "scheduled", "deferred", "open", "description")
Name = Annotated[str, typer.Argument(metavar="POOL", help="The pool.")]


@app.command("list")
def list_pools(output: OutputOption = Output.TABLE) -> None:
    """List all pools with what is taken of each."""
    from dflow.store import pools

    with transaction() as tx:
        usages = {usage.name: usage for usage in pools.usage_of_all(tx)}
        rows = [_row(pool, usages[pool.name]) for pool in pools.list_(tx)]
    show_list(rows, output, columns=_COLUMNS)


@app.command()
def get(name: Name, output: OutputOption = Output.TABLE) -> None:
    """Show one pool."""
    from dflow.store import pools

    with transaction() as tx:
        row = _row(pools.get(tx, name), pools.usage(tx, name))
    show_record(row, output)


@app.command("set", epilog="Example: dflow pools set api 5 'calls to the partner'")
def set_pool(
    name: Name,
    slots: Annotated[
        int, typer.Argument(metavar="SLOTS", min=-1, help="How many slots; -1: no limit. Write `-- -1` for that.")
    ],
    description: Annotated[str | None, typer.Argument(metavar="DESCRIPTION", help="What it is for.")] = None,
) -> None:
    """Create a pool, or change its slots."""
    from dflow.store import pools

    with transaction() as tx:
        pool = pools.set_(tx, name=name, slots=slots, description=description)
    note(f"The pool {pool.name} has {'no limit' if pool.slots < 0 else f'{pool.slots} slots'} now.")


@app.command()
def delete(name: Name) -> None:
    """Delete a pool that nothing uses."""
    from dflow.store import pools

    with transaction() as tx:
        pools.delete(tx, name)
    note(f"The pool {name} is deleted.")


def _row(pool: Pool, usage: PoolUsage) -> dict[str, Any]:
    return {
        "name": pool.name,
        "slots": pool.slots,
        "running": usage.running,
        "queued": usage.queued,
        "scheduled": usage.scheduled,
        "deferred": usage.deferred,
        "open": usage.open,
        "description": pool.description,
    }

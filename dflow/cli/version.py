"""`dflow version`: one line, at once."""

from __future__ import annotations

from dflow.cli.output import write


def version() -> None:
    """Print the version of dflow."""
    from dflow import __version__

    write(f"{__version__}\n")

"""The command `dflow`: one file per noun, registered here; and where errors become messages and exit codes.

Exit codes: 0 done, 1 it failed, 2 wrong usage or settings, 69 Postgres or Redis away, 70 a defect of dflow, 130 Ctrl-C,
141 the reader of our output went away. Promise: starting is quick, so nothing here or at the top of a noun's file
imports SQLAlchemy, Celery or rich.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Final, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from dflow.cli import components, config, dags, db, info, output, pools, runs, session, tasks, version
from dflow.core.errors import DagImportError, DflowError, SettingsError

_RUN, _WORK, _SETUP = "Run dflow", "Work with DAGs", "Set up and look after"
_DEFECT_EXIT_CODE: Final = 70  # EX_SOFTWARE
_INTERRUPTED_EXIT_CODE: Final = 130  # 128 + SIGINT, as a shell reports it
_BROKEN_PIPE_EXIT_CODE: Final = 141  # 128 + SIGPIPE

_EPILOG = """
**Examples**

`dflow standalone` starts everything on this machine.

`dflow dags trigger tz_report --wait` runs a DAG and shows how it goes.

`dflow tasks logs tz_report RUN TASK --follow` reads what a task says while it runs.

`dflow config explain core.executor` tells where a setting comes from.
"""


class _Commands(TyperGroup):
    """The top level. Loads `standalone`, which nobody else needs, when it is asked for."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return name, command and the rest of the arguments; called for the command that runs, not for listings."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, _standalone() if name == "standalone" else command, rest


def _standalone() -> Any:
    from dflow.cli.standalone import app_command

    loaded = typer.Typer(add_completion=False)
    loaded.command("standalone")(app_command)
    return get_command(loaded)


app = typer.Typer(
    name="dflow",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # see `run`
    help="A distributed, Celery-based execution backend for DAGs.",
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        version.version()
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log everything.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    session.flags.debug = debug
    if debug:
        import logging

        logging.basicConfig(level=logging.DEBUG)


def _standalone_stand_in() -> None:
    """Start everything on this machine: Postgres, Redis, all components and workers."""


app.command("standalone", rich_help_panel=_RUN)(_standalone_stand_in)
app.command("scheduler", rich_help_panel=_RUN)(components.scheduler)
app.command("dag-processor", rich_help_panel=_RUN)(components.dag_processor)
app.command(
    "worker",
    rich_help_panel=_RUN,
    context_settings=components.PASS_ON,
    epilog="Example: dflow worker -q default,heavy -c 8 -n w1",
)(components.worker)
app.command("flower", rich_help_panel=_RUN, context_settings=components.PASS_ON)(components.flower)
app.add_typer(dags.app, name="dags", rich_help_panel=_WORK)
app.add_typer(runs.app, name="runs", rich_help_panel=_WORK)
app.add_typer(tasks.app, name="tasks", rich_help_panel=_WORK)
app.add_typer(pools.app, name="pools", rich_help_panel=_WORK)
app.add_typer(config.app, name="config", rich_help_panel=_SETUP)
app.add_typer(db.app, name="db", rich_help_panel=_SETUP)
app.command("info", rich_help_panel=_SETUP)(info.info)
app.command("version", rich_help_panel=_SETUP)(version.version)


def run() -> NoReturn:
    """Run the command line and leave with its exit code; the entry point of the program."""
    code = _run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE_EXIT_CODE
    if code == _BROKEN_PIPE_EXIT_CODE:
        # The interpreter flushes once more on its way out; let it flush into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run() -> int:
    try:
        app(prog_name="dflow")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except KeyboardInterrupt:
        return _INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        return _BROKEN_PIPE_EXIT_CODE
    except DflowError as error:
        return _report(error)
    except Exception:  # noqa: BLE001 - the last resort of the program
        return _report_defect()
    return 0


def _report(error: DflowError) -> int:
    if session.flags.debug:
        import traceback

        traceback.print_exc()
    if isinstance(error, DagImportError) and error.traceback:
        output.err().print(error.traceback.rstrip(), markup=False, soft_wrap=True)  # of the user's file, not ours
    if isinstance(error, SettingsError) and len(error.problems) > 1:
        lines = "\n".join(f"  - {problem}" for problem in error.problems)
        output.fail(f"{len(error.problems)} problems with the settings:\n{lines}")
    else:
        output.fail(str(error))
    return error.exit_code


def _report_defect() -> int:
    """Nobody meant this to happen, so the traceback is what helps; DflowError is for what people can mend."""
    import traceback

    traceback.print_exc()
    output.fail("this is a defect of dflow; please report it with the lines above")
    return _DEFECT_EXIT_CODE

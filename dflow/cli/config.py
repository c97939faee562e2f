"""`dflow config`: what the settings are, where each comes from, and what is wrong with them. Shows no secrets.

Only `get-value` prints a secret, because a program that asks for one value needs it as it is (Airflow's command of the
same name does so too).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dflow.cli.output import Output, OutputOption, note, show_list, show_record, write

app = typer.Typer(no_args_is_help=True, help="Show, explain and check the settings.")


@app.command("list", epilog="Example: dflow config list --section worker --sources")
def list_settings(
    section: Annotated[str | None, typer.Option(help="Only this section.")] = None,
    sources: Annotated[bool, typer.Option("--sources", help="Also show where each value comes from.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List every setting with its value; secrets are hidden. Works as far as it can with broken settings too."""
    from dflow.core.errors import SettingsError

    rows, problems = _rows(section)
    columns = ["section", "key", "value", *(["source"] if sources else [])]
    show_list(rows, output, columns=columns)
    if problems:
        raise SettingsError(problems)


@app.command("get-value", epilog="Example: dflow config get-value core executor")
def get_value(
    section: Annotated[str, typer.Argument(metavar="SECTION", help="The section, such as core.")],
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key, such as executor.")],
) -> None:
    """Print one value as it is, secrets too. Needs only this setting to be right."""
    from dflow.core.errors import SettingsError
    from dflow.settings import find, home_of, resolver_for
    from dflow.settings.values import to_text

    setting = find(section, key)
    resolved = resolver_for(home_of(os.environ), os.environ).resolve(setting)
    if resolved.problem:
        raise SettingsError([resolved.problem])
    write(to_text(resolved.value) + "\n")


@app.command(epilog="Example: dflow config explain database.sql_alchemy_conn")
def explain(
    name: Annotated[str, typer.Argument(metavar="SECTION.KEY", help="The setting, such as core.executor.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what a setting means, its value, the source that won and the sources it won over."""
    from dflow.core.errors import SettingsError
    from dflow.settings import find, home_of, resolver_for

    setting = find(*_split(name))
    resolved = resolver_for(home_of(os.environ), os.environ).resolve(setting)
    explained = resolved.explain()
    record: dict[str, Any] = {
        "setting": setting.name,
        "value": explained.shown,
        "source": explained.winner.source,
        "overrides": [f"{loser.source}: {loser.shown or '(empty)'}" for loser in explained.losers],
        "meaning": setting.description,
        "type": setting.kind,
        "unit": setting.unit or None,
        "default": setting.default,
        "variable": setting.env_name,
        "may_be_a_command": setting.allows_command,
    }
    show_record({key: value for key, value in record.items() if value is not None}, output)
    if resolved.problem:
        raise SettingsError([resolved.problem])


@app.command()
def check() -> None:
    """Check all settings, report every problem at once, and end with exit code 2 when there is one."""
    from dflow.settings import load

    settings = load()
    where = settings.config_file if settings.config_file.exists() else f"no file at {settings.config_file}"
    note(f"The settings are right ({where}).")


@app.command(epilog="Example: dflow config generate --file ~/.dflow/dflow.cfg")
def generate(
    file: Annotated[Path | None, typer.Option(help="Write here instead of to standard output; must not exist.")] = None,
) -> None:
    """Make a dflow.cfg in which every setting is explained and commented out."""
    from dflow.core.errors import ConflictError
    from dflow.settings.generate import config_text

    if file is None:
        write(config_text())
        return
    file = file.expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:  # never over a file somebody wrote
            os.fchmod(stream.fileno(), 0o600)  # passwords will stand in it
            stream.write(config_text())
    except FileExistsError:
        raise ConflictError(f"{file} exists already; move it away first, or choose another --file") from None
    note(f"Wrote {file}.")


def _rows(section: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    from dflow.core.errors import NotFoundError
    from dflow.settings import all_settings, declarations, home_of, resolver_for
    from dflow.settings.suggest import did_you_mean

    if section is not None and section.lower() not in declarations():
        raise NotFoundError(f"there is no section {section!r}{did_you_mean(section, declarations())}")
    resolver = resolver_for(home_of(os.environ), os.environ)
    wanted = [s for s in all_settings() if section is None or s.section == section.lower()]
    resolved = [resolver.resolve(setting) for setting in wanted]
    rows = [
        {"section": e.setting.section, "key": e.setting.key, "value": e.shown, "source": e.winner.source}
        for e in (item.explain() for item in resolved)
    ]
    return rows, resolver.problems() + [item.problem for item in resolved if item.problem is not None]


def _split(name: str) -> tuple[str, str]:
    from dflow.core.errors import NotFoundError
    from dflow.settings import all_settings

    section, dot, key = name.partition(".")
    if dot:
        return section, key
    named: Iterator[str] = (setting.name for setting in all_settings() if setting.key == name.lower())
    hint = " or ".join(named)
    raise NotFoundError(
        f"{name!r} is not SECTION.KEY{f'; did you mean {hint}?' if hint else ', such as core.executor'}"
    )

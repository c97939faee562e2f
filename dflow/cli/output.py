"""How commands show things: tables for people; JSON, YAML and tab-separated lines for programs.

Promises: results go to standard output and everything else to standard error; without a terminal, and with NO_COLOR,
there is no escape sequence and no line is cut or wrapped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from enum import StrEnum
from typing import IO, TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Row = Mapping[str, Any]

_WIDE: Final = 100_000  # the width of what is no terminal: nothing is wrapped
_WHOLE: Final = ("_id", "_at", "state")
_LEAST_COLUMN: Final = 10
_SECONDS: Final = "_seconds"  # a column of this suffix is a length of time; tables show it as people read it
_STATE_COLUMNS: Final = frozenset({"state", "from_state", "to_state"})
STATE_STYLES: Final[dict[str, str]] = {
    "success": "green",
    "running": "cyan",
    "live": "green",
    "failed": "bold red",
    "upstream_failed": "red",
    "up_for_retry": "yellow",
    "up_for_reschedule": "yellow",
    "queued": "blue",
    "scheduled": "blue",
    "deferred": "magenta",
    "skipped": "dim",
    "removed": "dim",
    "none": "dim",
    "gone": "red",
}


class Output(StrEnum):
    """The forms of a listing."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    PLAIN = "plain"


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="The form: a table, JSON, YAML, or tab-separated lines.")
]


def out() -> Console:
    """Return the console of standard output."""
    return _console(sys.stdout)


def err() -> Console:
    """Return the console of standard error."""
    return _console(sys.stderr)


def note(message: str) -> None:
    """Tell people something that is not the result."""
    err().print(message, markup=False, highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Tell people something they should look at."""
    _prefixed("Warning", "yellow", message)


def fail(message: str) -> None:
    """Tell why the command failed."""
    _prefixed("Error", "bold red", message)


def show_list(rows: Sequence[Row], output: Output, *, columns: Sequence[str], empty: str = "Nothing to list.") -> None:
    """Show rows. ``columns`` are their keys in order; JSON and YAML are lists of objects, plain has a line of names.

    A table leaves out the columns that have nothing in any row.
    """
    records = [{name: row[name] for name in columns} for row in rows]
    match output:
        case Output.JSON | Output.YAML:
            _dump(records, output)
        case Output.PLAIN:
            lines = [columns, *([_plain(value) for value in record.values()] for record in records)]
            write("".join("\t".join(line) + "\n" for line in lines))
        case _ if not rows:
            note(empty)
        case _:
            _table(records, columns)


def show_record(record: Row, output: Output) -> None:
    """Show one thing: a name and a value on each line, or one object."""
    match output:
        case Output.JSON | Output.YAML:
            _dump(record, output)
        case Output.PLAIN:
            write("".join(f"{name}\t{_plain(value)}\n" for name, value in record.items()))
        case _:
            _record_table(record)


def write(text: str) -> None:
    """Write text to standard output as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def styled_state(state: str) -> Text:
    """Return the name of a state in its colour."""
    from rich.text import Text

    return Text(state, style=STATE_STYLES.get(state, ""))


def instant(value: datetime | None) -> str:
    """Return an instant as people read it: UTC, to the second."""
    return "" if value is None else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def duration(seconds: float | None) -> str:
    """Return a length of time: 0.42s, 12.3s, 4m05s, 1h02m."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.2f}s"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def is_plain_terminal() -> bool:
    """Return whether the environment asks for no escape sequences (no-color.org, terminfo's dumb terminal)."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else _WIDE
    return Console(file=stream, width=width, color_system=None if is_plain_terminal() else "auto", highlight=False)


def _prefixed(word: str, style: str, message: str) -> None:
    from rich.text import Text

    err().print(Text.assemble((f"{word}: ", style), message), soft_wrap=True)


def _table(records: Sequence[Row], columns: Sequence[str]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    shown = [name for name in columns if any(record[name] is not None for record in records)]
    whole = _in_one_piece(records, shown)
    for name in shown:
        is_number = all(isinstance(record[name], int | float) for record in records)
        table.add_column(_title(name), justify="right" if is_number else "left", overflow="fold", no_wrap=name in whole)
    for record in records:
        table.add_row(*(_cell(name, record[name]) for name in shown))
    _print(table)


def _in_one_piece(records: Sequence[Row], columns: Sequence[str]) -> set[str]:
    """Ids are copied into the next command and states looked for: they are not wrapped where the rest has some room."""
    whole = {name for name in columns if name.endswith(_WHOLE)}
    needed = sum(max(len(_shown(record[name])) for record in records) + 3 for name in whole)
    return whole if needed + _LEAST_COLUMN * (len(columns) - len(whole)) <= out().width else set()


def _record_table(record: Row) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in record.items():
        table.add_row(_title(name), _cell(name, value))
    _print(table)


def _print(table: Table) -> None:
    """Print a table; off a terminal without the blanks that fill up its last column."""
    console = out()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _cell(name: str, value: Any) -> Text:
    from rich.text import Text

    if name in _STATE_COLUMNS:
        return styled_state(str(value))
    return Text(duration(value) if name.endswith(_SECONDS) else _shown(value))


def _title(name: str) -> str:
    return name.removesuffix(_SECONDS).replace("_", " ")


def _shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return instant(value)
        case float():
            return f"{value:g}"
        case list() | tuple():
            return ", ".join(_shown(item) for item in value)
        case Mapping():
            return json.dumps(_jsonable(value), ensure_ascii=False)
        case _:
            return str(value)


def _plain(value: Any) -> str:
    text = value.isoformat() if isinstance(value, datetime) else _shown(value)
    return text.replace("\t", " ").replace("\r", " ").replace("\n", " ")


def _dump(value: Any, output: Output) -> None:
    data = _jsonable(value)
    if output is Output.JSON:
        write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return
    import yaml

    write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=_WIDE))


def _jsonable(value: Any) -> Any:
    match value:
        case None | bool() | int() | float():
            return value
        case datetime() | date():
            return value.isoformat()
        case Mapping():
            return {str(key): _jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case _:
            return str(value)

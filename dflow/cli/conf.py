"""The conf of a manual run from the command line: JSON, with errors that point at the place, checked against params."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import typer

_CONTEXT_CHARACTERS: Final = 30


def parse_conf(text: str | None) -> dict[str, Any]:
    """Return the object in a text: JSON, ``@FILE`` with JSON in it, or ``-`` for standard input.

    Raises typer.BadParameter with line, column and the place.
    """
    if text is None:
        return {}
    text = _read(text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {_pointed(text, error)}", param_hint="--conf") from None
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--conf") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected an object like {{...}}, got {text.strip()[:40]}", param_hint="--conf")
    return value


def check_conf(params: Mapping[str, Mapping[str, Any]], conf: Mapping[str, Any], *, overrides: bool) -> None:
    """Raise typer.BadParameter with every param that the conf, or a missing value, leaves wrong.

    ``params`` is their serialized form; ``overrides`` says whether conf replaces params (core setting).
    """
    from dflow.authoring.exceptions import ParamValidationError
    from dflow.authoring.param import UNSET, validate

    given = conf if overrides else {}
    problems = []
    for name, spec in params.items():
        try:
            validate(name, given.get(name, spec.get("value", UNSET)), spec.get("schema") or {})
        except ParamValidationError as error:
            problems.append(str(error))
    if problems:
        raise typer.BadParameter("; ".join(problems), param_hint="--conf")


def parse_instant(text: str, timezone: str) -> datetime:
    """Return an instant in UTC from ISO 8601; without an offset it is in ``timezone``. Raises typer.BadParameter."""
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a date; write 2026-11-22 or 2026-11-22T10:30:00+01:00", param_hint="--logical-date"
        ) from None
    if value.tzinfo is None:
        value = value.replace(tzinfo=ZoneInfo(timezone))
    return value.astimezone(UTC)


def _read(text: str) -> str:
    if text == "-":
        return sys.stdin.read()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {text[1:]}: {error}", param_hint="--conf") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _pointed(text: str, error: json.JSONDecodeError) -> str:
    """The line around the place, and a caret below it."""
    line = text.splitlines()[error.lineno - 1] if text.splitlines()[error.lineno - 1 :] else ""
    start = max(0, error.colno - 1 - _CONTEXT_CHARACTERS)
    shown = line[start : error.colno - 1 + _CONTEXT_CHARACTERS]
    caret = " " * (error.colno - 1 - start) + "^"
    message = error.msg[0].lower() + error.msg[1:]
    return f"{message} at line {error.lineno}, column {error.colno}\n  {shown}\n  {caret}"

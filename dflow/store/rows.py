"""From result rows to the row types of the aggregates: a query selects exactly the fields of its dataclass, by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from sqlalchemy import CursorResult

T = TypeVar("T")


def all_rows(cls: type[T], result: CursorResult[Any]) -> list[T]:
    """Return every row of the result as an instance of ``cls``."""
    return [cls(**row) for row in result.mappings()]


def first_row(cls: type[T], result: CursorResult[Any]) -> T | None:
    """Return the first row of the result as an instance of ``cls``, or None when there is none."""
    row = result.mappings().first()
    return None if row is None else cls(**row)


def columns(names: str, alias: str) -> str:
    """Return ``names`` (separated by blanks), each qualified with a table alias, for a SELECT or RETURNING list.

    ``name::type`` casts the column and keeps its name (uuids are text in Python).
    """
    return ", ".join(_column(name, alias) for name in names.split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def without_nul(value: str) -> str:
    """Return the text without NUL characters, which Postgres cannot hold in text or jsonb."""
    return value.replace("\x00", "\ufffd")


def _column(name: str, alias: str) -> str:
    bare, cast, to_type = name.partition("::")
    return f"CAST({alias}.{bare} AS {to_type}) AS {bare}" if cast else f"{alias}.{bare}"

"""Between Python and Postgres: result rows become row types (a query selects exactly the fields of its dataclass, by
name), and values become text and JSON that Postgres can hold.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from sqlalchemy import CursorResult

from dflow.core.errors import SerializationError

T = TypeVar("T")
_ESCAPED_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


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


def storable(value: str) -> str:
    """Return the text as Postgres can hold it: NUL becomes U+FFFD, a lone surrogate (an undecodable byte) becomes ?."""
    return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def json_document(value: Any, what: str) -> str:
    """Return the value as JSON text for a jsonb parameter.

    Raises SerializationError, saying ``what`` it is, for a value that has no JSON form or one that Postgres cannot hold
    (NaN, NUL characters, lone surrogates): data is refused rather than changed.
    """
    try:
        document = json.dumps(value, allow_nan=False, ensure_ascii=False)
        document.encode()
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise SerializationError(f"{what} has no JSON form that can be stored: {error}.") from error
    if _ESCAPED_NUL.search(document):
        raise SerializationError(f"{what} holds a NUL character, which Postgres cannot store; remove it.")
    return document


def _column(name: str, alias: str) -> str:
    bare, cast, to_type = name.partition("::")
    return f"CAST({alias}.{bare} AS {to_type}) AS {bare}" if cast else f"{alias}.{bare}"

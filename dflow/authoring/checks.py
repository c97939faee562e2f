"""Small validators of what people give to DAGs and operators: each returns the value or raises `DagDefinitionError`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from dflow.authoring.refusal import did_you_mean, refusal

MAX_ID_LENGTH: Final = 250  # Airflow's limit for dag, task and group ids
MAX_TAG_LENGTH: Final = 100
INT32: Final = 2**31 - 1
_KEY = re.compile(r"[\w.-]+")
_GROUP_KEY = re.compile(r"[\w-]+")


def identifier(value: object, kind: str) -> str:
    """Check a dag or task id: letters, digits, ``_ . -``, at most 250 characters (Airflow's rule)."""
    return _identifier(value, kind, _KEY, "letters, digits, dashes, dots and underscores")


def group_identifier(value: object) -> str:
    """Check a task group id: as a task id but without dots, because dots separate groups."""
    return _identifier(value, "group_id", _GROUP_KEY, "letters, digits, dashes and underscores")


def _identifier(value: object, kind: str, pattern: re.Pattern[str], allowed: str) -> str:
    if not isinstance(value, str):
        raise refusal(f"{kind} must be a string, not {type(value).__name__}")
    if len(value) > MAX_ID_LENGTH:
        raise refusal(f"{kind} {value[:40]!r}... has {len(value)} characters; at most {MAX_ID_LENGTH} are allowed")
    if not pattern.fullmatch(value):
        raise refusal(f"{kind} {value!r} is not valid: use only {allowed}, and at least one of them")
    return value


def instant(value: object, what: str) -> datetime | None:
    """Check an instant: None or an aware datetime. A naive one has no meaning on two machines, so it is refused."""
    if value is None:
        return None
    if not isinstance(value, datetime):
        hint = "use datetime(year, month, day, tzinfo=UTC)" if isinstance(value, date | str) else "use a datetime"
        raise refusal(f"{what} must be a datetime with a time zone, not {type(value).__name__} {value!r}; {hint}")
    if value.tzinfo is None or value.utcoffset() is None:
        arguments = ", ".join(str(part) for part in value.timetuple()[: 5 if value.hour or value.minute else 3])
        raise refusal(
            f"{what} {value.isoformat()} has no time zone; give it one, e.g. datetime({arguments}, tzinfo=UTC) "
            f"(from datetime import UTC) or tzinfo=ZoneInfo('Europe/Berlin')"
        )
    return value


def utc(value: datetime | None) -> datetime | None:
    """Return the instant in UTC, as a plain datetime whatever subclass it came as."""
    if value is None:
        return None
    value = value.astimezone(UTC)
    return datetime(*value.timetuple()[:6], value.microsecond, tzinfo=UTC)


def zone_name(zone: tzinfo | str, what: str) -> str:
    """Return the IANA name of a time zone; fixed offsets of whole hours become ``Etc/GMT...``."""
    if isinstance(zone, str):
        name = zone
    else:
        name = getattr(zone, "key", None) or getattr(zone, "zone", None) or getattr(zone, "name", None) or ""
        if not isinstance(name, str) or not name or name.startswith(("+", "-")):
            return _fixed_offset_name(zone, what)
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise refusal(
            f"{what} names the unknown time zone {name!r}; use an IANA name such as 'UTC' or 'Europe/Berlin'"
        ) from error
    return name


def _fixed_offset_name(zone: tzinfo, what: str) -> str:
    offset = zone.utcoffset(None) or zone.utcoffset(datetime(2000, 1, 1)) or timedelta()
    hours = offset / timedelta(hours=1)
    if hours == 0:
        return "UTC"
    if not hours.is_integer() or not -12 <= hours <= 14:
        raise refusal(f"{what} has the fixed offset {offset}; use a zone with a name, ZoneInfo('Area/City')")
    return f"Etc/GMT{-int(hours):+d}"  # POSIX signs: Etc/GMT-2 lies two hours EAST of Greenwich


def duration(value: object, what: str, *, zero: bool = True, numbers: bool = False) -> timedelta | None:
    """Check a length of time: None or a timedelta that is not negative; ``numbers`` allows seconds as int or float."""
    if value is None:
        return None
    if numbers and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = timedelta(seconds=value)
    if not isinstance(value, timedelta):
        raise refusal(f"{what} must be a timedelta, not {type(value).__name__}; e.g. timedelta(minutes=5)")
    if value < timedelta() or (not zero and not value):
        raise refusal(f"{what} must {'not be negative' if zero else 'be more than zero'}, got {value}")
    return value


def integer(value: object, what: str, *, low: int, high: int = INT32) -> int:
    """Check a whole number within ``low``..``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal(f"{what} must be an int, not {type(value).__name__} {value!r}")
    if not low <= value <= high:
        raise refusal(f"{what} must be between {low} and {high}, got {value}")
    return value


def boolean(value: object, what: str) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        raise refusal(f"{what} must be True or False, not {type(value).__name__} {value!r}")
    return value


def text(value: object, what: str) -> str | None:
    """Check an optional string."""
    if value is not None and not isinstance(value, str):
        raise refusal(f"{what} must be a string, not {type(value).__name__} {value!r}")
    return value


def one_of(value: object, what: str, allowed: Iterable[str]) -> str:
    """Check a value of a closed set of names, with a suggestion for a near miss."""
    allowed = list(allowed)
    if value not in allowed:
        raise refusal(
            f"{what} {value!r} does not exist{did_you_mean(str(value), allowed)}; it is one of: {', '.join(allowed)}"
        )
    return str(value)


def json_value(value: object, what: str) -> Any:
    """Check that a value is plain JSON and return it as JSON would give it back (tuples become lists)."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise refusal(f"{what} is not JSON ({error}); use strings, numbers, booleans, None, lists and dicts") from error

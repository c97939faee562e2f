"""``macros`` of templates: small helpers for dates, and the modules Airflow offers there."""

from __future__ import annotations

import datetime as datetime_module
import importlib
import json
import random as _random
import time as time_module
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

Instant = datetime  # inside the class, datetime is a name of the templates


class Macros:
    """What ``{{ macros.x }}`` gives: `ds_add`, `ds_format`, `datetime_diff_for_humans`, and the names below.

    ``datetime`` and ``timedelta`` are the classes, ``time``, ``uuid``, ``json``, ``yaml`` and ``dateutil`` modules,
    ``random`` the function, as in Airflow.
    """

    datetime = datetime_module.datetime
    timedelta = datetime_module.timedelta
    time = time_module
    uuid = uuid
    json = json
    random = staticmethod(_random.random)

    @staticmethod
    def ds_add(ds: str, days: int) -> str:
        """Return the day ``days`` after (or before, if negative) a "YYYY-MM-DD" day."""
        return str((datetime.strptime(ds, "%Y-%m-%d") + timedelta(days=days)).date()) if days else str(ds)

    @staticmethod
    def ds_format(ds: str, input_format: str, output_format: str) -> str:
        """Return a date given in one strftime format in another one."""
        return datetime.strptime(str(ds), input_format).strftime(output_format)

    @staticmethod
    def datetime_diff_for_humans(dt: Instant, since: Instant | None = None) -> str:
        """Return how far ``dt`` lies from ``since`` (default: now): "2 days ago", or "2 days before" with since."""
        delta = dt - (since or datetime.now(UTC if dt.tzinfo else None))
        seconds = abs(delta.total_seconds())
        units = (("year", 31_557_600), ("month", 2_629_800), ("week", 604_800), ("day", 86_400), ("hour", 3_600),
                 ("minute", 60), ("second", 1))  # fmt: skip
        name, size = next(((name, size) for name, size in units if seconds >= size), ("second", 1))
        count = int(seconds // size)
        text = f"{count} {name}{'' if count == 1 else 's'}"
        is_past = delta < timedelta()
        if since is not None:
            return f"{text} {'before' if is_past else 'after'}"
        return f"{text} ago" if is_past else f"in {text}"

    def __getattr__(self, name: str) -> Any:
        if name in ("yaml", "dateutil"):  # slow to import, seldom used
            return importlib.import_module(name)
        raise AttributeError(f"macros has no {name!r}")


MACROS = Macros()


def ds(value: datetime) -> str:
    """Template filter: the day as "YYYY-MM-DD"."""
    return value.strftime("%Y-%m-%d")


def ds_nodash(value: datetime) -> str:
    """Template filter: the day as "YYYYMMDD"."""
    return value.strftime("%Y%m%d")


def ts(value: datetime) -> str:
    """Template filter: the instant in ISO 8601."""
    return value.isoformat()


def ts_nodash(value: datetime) -> str:
    """Template filter: the instant as "YYYYMMDDTHHMMSS"."""
    return value.strftime("%Y%m%dT%H%M%S")


def ts_nodash_with_tz(value: datetime) -> str:
    """Template filter: the instant as "YYYYMMDDTHHMMSS+0000"."""
    return value.isoformat().replace("-", "").replace(":", "")


FILTERS = {"ds": ds, "ds_nodash": ds_nodash, "ts": ts, "ts_nodash": ts_nodash, "ts_nodash_with_tz": ts_nodash_with_tz}

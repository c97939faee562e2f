"""Timetables: when the next run of a DAG is due. Pure: the caller passes ``now`` and what ran last.

Airflow 3's defaults: a cron string or a timedelta makes *trigger* runs, whose logical date, both ends of the data
interval and ``run_after`` are all the tick. With ``catchup`` every tick since the last run (or since ``start_date``)
gets a run, one call at a time, so the caller bounds how many; without it only the latest missed one does.

Ticks are a fixed set of instants, given by the schedule alone, so asking twice gives one answer:

- *cron* by wall clock; for gaps and folds see `dflow.core.cron`.
- *delta* at ``start_date + k * interval``, or, without a start date, at ``k * interval`` from the beginning of 1970 in
  the time zone. (Airflow counts from the last run instead; the two agree until the schedule is edited.) Intervals of
  whole days follow the wall clock: a daily run at 02:30 stays at 02:30, fires once at the first instant after a gap on
  the day 02:30 does not exist, and at the first showing on the day it comes twice. Shorter intervals are real time.

``end_date`` is inclusive: a tick at that instant still runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final, Protocol
from zoneinfo import ZoneInfo

from dflow.core.cron import PRESETS, first_instant_of, parse, validate_cron
from dflow.core.errors import DagDefinitionError
from dflow.core.spec import ScheduleSpec

__all__ = ["PRESETS", "DueRun", "next_run", "ticks_between", "validate_cron", "zone_for"]

_KINDS: Final = ("none", "once", "continuous", "cron", "delta")
_TICK: Final = timedelta.resolution
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DueRun:
    """A run that is due at ``run_after``. All instants are aware UTC."""

    logical_date: datetime
    interval_start: datetime
    interval_end: datetime
    run_after: datetime


class Ticks(Protocol):
    """A periodic schedule: an increasing sequence of instants (UTC)."""

    def next_after(self, instant: datetime) -> datetime | None:
        """Return the first tick strictly after ``instant``, None if there is none."""
        ...

    def latest_at(self, instant: datetime) -> datetime | None:
        """Return the last tick at or before ``instant``, None if there is none."""
        ...


def next_run(
    schedule: ScheduleSpec,
    *,
    last: DueRun | None,
    start_date: datetime | None,
    end_date: datetime | None,
    catchup: bool,
    now: datetime,
) -> DueRun | None:
    """Return the run that comes after ``last`` (the last one this schedule made; None: none yet), or None: never again.

    The answer may lie in the past (due at once) or in the future. Without a start date the first run is the first tick
    at or after ``now``. ``@once`` runs at ``start_date`` or now, whatever ``catchup`` says; ``@continuous`` runs again
    as soon as it is asked, over the interval since its last run; the caller keeps it to one active run. All instants
    are aware. Raises DagDefinitionError for a schedule that cannot work.
    """
    match schedule.kind:
        case "none":
            due = None
        case "once":
            due = None if last else _at(start_date or now)
        case "continuous":
            due = _continuous(last, start_date or now, now)
        case _:
            due = _periodic(_ticks(schedule, start_date), last, start_date, catchup, now)
    return due if due and (end_date is None or due.run_after <= end_date) else None


def ticks_between(
    schedule: ScheduleSpec, start: datetime, end: datetime, *, start_date: datetime | None = None
) -> Iterator[datetime]:
    """Yield the ticks from ``start`` to ``end``, both inclusive (for backfills and previews); none if not periodic.

    ``start_date`` is the DAG's: it anchors a delta schedule, and limits nothing.
    """
    if schedule.kind not in ("cron", "delta"):
        return
    ticks = _ticks(schedule, start_date)
    tick = ticks.next_after(start - _TICK)
    while tick is not None and tick <= end:
        yield tick
        tick = ticks.next_after(tick)


def zone_for(name: str) -> ZoneInfo:
    """Return the IANA time zone of that name; DagDefinitionError if there is none."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # not found; not a relative path; a directory of zones
        raise DagDefinitionError(
            f"unknown time zone {name!r}; use an IANA name such as 'UTC' or 'Europe/Berlin'"
        ) from None


def _at(instant: datetime) -> DueRun:
    tick = instant.astimezone(UTC)
    return DueRun(logical_date=tick, interval_start=tick, interval_end=tick, run_after=tick)


def _continuous(last: DueRun | None, start: datetime, now: datetime) -> DueRun:
    """The interval since the last run. The logical date is its end (Airflow: its start), since two runs must not share
    one and the first run's interval may be empty."""
    if last is None:
        end = max(start, now).astimezone(UTC)
        return DueRun(logical_date=end, interval_start=start.astimezone(UTC), interval_end=end, run_after=end)
    end = max(now.astimezone(UTC), last.run_after + _TICK)
    return DueRun(logical_date=end, interval_start=last.interval_end, interval_end=end, run_after=end)


def _periodic(
    ticks: Ticks, last: DueRun | None, start_date: datetime | None, catchup: bool, now: datetime
) -> DueRun | None:
    """The first tick after the last run, not before the start; without catchup, not one that a missed one follows."""
    after = [start_date - _TICK] if start_date is not None else []
    if last is not None:
        after.append(last.run_after)
    tick = ticks.next_after(max(after, default=now - _TICK))
    if not catchup and tick is not None and tick < now:
        tick = ticks.latest_at(now)
    return _at(tick) if tick is not None else None


def _ticks(schedule: ScheduleSpec, start_date: datetime | None) -> Ticks:
    zone = zone_for(schedule.timezone)
    if schedule.kind == "cron" and schedule.expression is not None:
        return _CronTicks(schedule.expression, zone)
    if schedule.kind == "delta" and schedule.interval_seconds is not None:
        return _delta_ticks(schedule.interval_seconds, zone, start_date)
    if schedule.kind in _KINDS:
        missing = "an expression" if schedule.kind == "cron" else "interval_seconds"
        raise DagDefinitionError(f"a schedule of kind {schedule.kind!r} needs {missing}")
    raise DagDefinitionError(f"unknown kind of schedule {schedule.kind!r}; use one of {', '.join(_KINDS)}")


class _CronTicks:
    def __init__(self, expression: str, zone: tzinfo) -> None:
        self._cron, self._zone = parse(expression), zone

    def next_after(self, instant: datetime) -> datetime | None:
        return self._cron.next_after(instant, self._zone)

    def latest_at(self, instant: datetime) -> datetime | None:
        return self._cron.latest_at(instant, self._zone)


def _delta_ticks(seconds: float, zone: tzinfo, start_date: datetime | None) -> Ticks:
    try:
        interval = timedelta(seconds=seconds)
    except (OverflowError, ValueError):
        interval = timedelta()
    if interval < timedelta(seconds=1):
        raise DagDefinitionError(f"a schedule every {seconds} seconds cannot work; the interval is at least one second")
    anchor = start_date.astimezone(zone) if start_date else datetime(1970, 1, 1, tzinfo=zone)
    return _DeltaTicks(anchor, interval, zone)


class _DeltaTicks:
    """Ticks at ``anchor + k * interval`` for every whole k, negative ones too; by wall clock for whole days."""

    def __init__(self, anchor: datetime, interval: timedelta, zone: tzinfo) -> None:
        self._interval, self._zone = interval, zone
        self._is_wall = interval % _DAY == timedelta()
        self._anchor = anchor.replace(tzinfo=None) if self._is_wall else anchor.astimezone(UTC)

    def next_after(self, instant: datetime) -> datetime | None:
        try:
            number = self._number(instant) - 1
            while (tick := self._tick(number)) <= instant:
                number += 1
        except OverflowError:
            return None
        return tick

    def latest_at(self, instant: datetime) -> datetime | None:
        try:
            number = self._number(instant) + 2
            while (tick := self._tick(number)) > instant:
                number -= 1
        except OverflowError:
            return None
        return tick

    def _number(self, instant: datetime) -> int:
        """Return how many intervals after the anchor ``instant`` lies; too few while the clock shows times again."""
        here = instant.astimezone(self._zone).replace(tzinfo=None) if self._is_wall else instant
        return (here - self._anchor) // self._interval

    def _tick(self, number: int) -> datetime:
        tick = self._anchor + number * self._interval
        return first_instant_of(tick, self._zone) if self._is_wall else tick.astimezone(UTC)

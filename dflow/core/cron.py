"""Cron expressions: five fields, read by wall clock in a time zone, with a stated policy for clock changes.

Fields: minute (0-59), hour (0-23), day of month (1-31), month (1-12 or jan-dec), day of week (0-7 or sun-sat; 0 and 7
are Sunday). Each is a list of ``*``, ``a``, ``a-b``, ``*/n``, ``a-b/n`` or ``a/n`` (from a to the end); a range may
wrap (``22-2``, ``sat-mon``). When both day fields are restricted, a day matches if either does; a field that allows all
its values is not restricted (as in croniter, which Airflow uses).

Clock changes, as in Debian's cron. An expression is *elapsed* if its minute or its hour field begins with ``*`` or
allows all values: ``*/15 * * * *``, ``0 * * * *``, ``0 */2 * * *``. Every other is *fixed*: ``30 2 * * *``.

- An elapsed expression fires whenever the clock shows a matching time. Hours that are shown twice fire twice, hours
  that are skipped do not exist: a job every 15 minutes runs every 15 minutes of real time, across both changes.
- A fixed expression fires when the clock first reaches or passes a matching time. A time that is skipped fires once, at
  the first instant after the gap (together with anything else due then); a time shown twice fires the first time only.
"""

from __future__ import annotations

import calendar
import difflib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import lru_cache
from typing import Final

from dflow.core.errors import DagDefinitionError

PRESETS: Final[dict[str, str]] = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@quarterly": "0 0 1 */3 *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_MINUTE: Final = timedelta(minutes=1)
_TICK: Final = timedelta.resolution
_HORIZON: Final = timedelta(hours=26)  # no zone has set its clock back by more than a day
_MONTHS_SEARCHED: Final = 12 * 9  # 29 February is at most 8 years away (1896 to 1904)
_MONTH_NAMES: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTHS: Final = {name: number for number, name in enumerate(_MONTH_NAMES, 1)}
_WEEKDAYS: Final = {"sun": 0, "mon": 1, "tue": 2, "wed": 3, "thu": 4, "fri": 5, "sat": 6}


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    low: int
    high: int
    names: Mapping[str, int]

    @property
    def size(self) -> int:
        return 7 if self.names is _WEEKDAYS else self.high - self.low + 1

    @property
    def range(self) -> str:
        names = f" or {next(iter(self.names))}-{list(self.names)[-1]}" if self.names else ""
        return f"{self.low}-{self.high}{names}"


_FIELDS: Final = (
    _Field("minute", 0, 59, {}),
    _Field("hour", 0, 23, {}),
    _Field("day of month", 1, 31, {}),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 7, _WEEKDAYS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cron:
    """A parsed expression. ``text`` is its normal form; the sets of values are sorted, weekdays with 0 = Sunday."""

    text: str
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    is_elapsed: bool

    def next_after(self, instant: datetime, zone: tzinfo) -> datetime | None:
        """Return the first tick strictly after ``instant`` (aware) in UTC, or None at the end of the calendar."""
        instant = instant.astimezone(UTC)
        try:
            find = self._next_elapsed if self.is_elapsed else self._next_fixed
            return find(instant, zone)
        except OverflowError:
            return None

    def latest_at(self, instant: datetime, zone: tzinfo) -> datetime | None:
        """Return the last tick at or before ``instant`` (aware) in UTC, or None at the beginning of the calendar.

        Found from `next_after` alone, so that both directions follow one policy: look back over twice the time until
        there is a tick, then halve the interval that holds the last one.
        """
        instant = instant.astimezone(UTC)
        try:
            early = instant - _MINUTE
            while not self._has_tick(early, instant, zone):
                early = instant - (instant - early) * 2
        except OverflowError:
            return None
        late = instant
        while late - early > _MINUTE:
            middle = early + (late - early) / 2
            if self._has_tick(middle, instant, zone):
                early = middle
            else:
                late = middle
        # Ticks are whole minutes of the wall clock, so at most two lie in what is left.
        first = self.next_after(early, zone)
        second = self.next_after(first, zone) if first else None
        return second if second and second <= instant else first

    def _has_tick(self, after: datetime, until: datetime, zone: tzinfo) -> bool:
        tick = self.next_after(after, zone)
        return tick is not None and tick <= until

    # -- by instant ----------------------------------------------------------------------------------------------

    def _next_fixed(self, instant: datetime, zone: tzinfo) -> datetime:
        wall = _wall(instant, zone)
        while True:
            wall = self._next_match(wall)
            tick = first_instant_of(wall, zone)
            if tick > instant:  # not so for the second showing of times that fired at the first
                return tick

    def _next_elapsed(self, instant: datetime, zone: tzinfo) -> datetime:
        wall = _wall(instant, zone)
        # When the clock is about to be turned back behind what it shows now, start that much earlier and go on until
        # no later wall time can come sooner.
        turned_back = _about_to_turn_back(instant, zone)
        wall -= turned_back
        best: datetime | None = None
        while True:
            wall = self._next_match(wall)
            if best is not None and wall - turned_back > _wall(best, zone):
                return best
            shown = _instants_of(wall, zone)
            later = [tick for tick in shown if tick > instant]
            if later:
                best = min(later) if best is None else min(best, *later)
                if not turned_back:
                    return best
            elif not shown:
                wall = _wall(_gap_end(wall, zone), zone) - _TICK  # leave the gap in one step

    # -- by wall clock -------------------------------------------------------------------------------------------

    def _next_match(self, wall: datetime) -> datetime:
        """Return the first matching wall time strictly after ``wall`` (naive); OverflowError past the last year."""
        start = wall.replace(second=0, microsecond=0) + _MINUTE
        for day in self._days_from(start.date()):
            clock = self._first_time(start.hour, start.minute) if day == start.date() else self._first_time(0, 0)
            if clock is not None:
                return datetime.combine(day, clock)
        raise OverflowError("the calendar ends before the next tick")

    def _first_time(self, hour: int, minute: int) -> time | None:
        """Return the first matching time of day at or after hour:minute."""
        place = bisect_left(self.hours, hour)
        if place < len(self.hours) and self.hours[place] == hour:
            later = bisect_left(self.minutes, minute)
            if later < len(self.minutes):
                return time(hour, self.minutes[later])
            place += 1
        return time(self.hours[place], self.minutes[0]) if place < len(self.hours) else None

    def _days_from(self, first: date) -> Iterator[date]:
        """Yield the matching days from ``first`` on, month by month, over a bounded time."""
        year, month, day = first.year, first.month, first.day
        for _ in range(_MONTHS_SEARCHED):
            if month in self.months:
                for number in range(day, calendar.monthrange(year, month)[1] + 1):
                    if self._matches_day(candidate := date(year, month, number)):
                        yield candidate
            year, month, day = (year, month + 1, 1) if month < 12 else (year + 1, 1, 1)
            if year > 9999:
                return

    def _matches_day(self, day: date) -> bool:
        by_month = day.day in self.days
        by_week = day.isoweekday() % 7 in self.weekdays
        if len(self.days) < 31 and len(self.weekdays) < 7:
            return by_month or by_week
        return by_month and by_week


def parse(expression: str) -> Cron:
    """Parse a five-field expression or a cron preset (``@daily``).

    Raises DagDefinitionError that names the field, what it allows and what to write instead; also for dates that do
    not exist (``0 0 31 2 *``).
    """
    return _parse(expression)


@lru_cache(maxsize=4096)
def _parse(expression: str) -> Cron:
    text = _resolve_preset(" ".join(expression.lower().split()))
    parts = text.split(" ")
    if len(parts) != len(_FIELDS) or not text:
        raise DagDefinitionError(
            f"cron expression {expression!r} has {len(parts) if text else 0} fields, expected 5: "
            "minute hour day-of-month month day-of-week (seconds and years are not supported)"
        )
    values = [_parse_field(field, part, expression) for field, part in zip(_FIELDS, parts, strict=True)]
    minutes, hours, days, months, weekdays = values
    cron = Cron(
        text=text,
        minutes=minutes,
        hours=hours,
        days=days,
        months=months,
        weekdays=weekdays,
        is_elapsed="*" in (parts[0][0], parts[1][0]) or len(minutes) == 60 or len(hours) == 24,
    )
    if next(cron._days_from(date(2000, 1, 1)), None) is None:
        raise DagDefinitionError(
            f"cron expression {expression!r} never fires: no month of {_show(months)} has a day {_show(days)}; "
            "change the day-of-month or the month field"
        )
    return cron


def validate_cron(expression: str) -> str:
    """Return the normal form (lower case, single spaces, presets resolved); raises DagDefinitionError as `parse`."""
    return parse(expression).text


def _resolve_preset(text: str) -> str:
    if not text.startswith("@"):
        return text
    if text in PRESETS:
        return PRESETS[text]
    near = difflib.get_close_matches(text, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(PRESETS)} or five fields."
    raise DagDefinitionError(f"{text!r} is not a cron preset; {hint}")


def _parse_field(field: _Field, text: str, expression: str) -> tuple[int, ...]:
    values: set[int] = set()
    for item in text.split(","):
        try:
            values.update(_parse_item(field, item))
        except _BadItemError as problem:
            raise DagDefinitionError(
                f"cron expression {expression!r}, {field.name} field ({field.range}): {problem}"
            ) from None
    return tuple(sorted(values))


class _BadItemError(Exception):
    """One item of a field is wrong; the message says how."""


def _parse_item(field: _Field, item: str) -> Iterator[int]:
    body, slash, step_text = item.partition("/")
    step = _parse_step(field, item, step_text) if slash else 1
    low, high = _parse_range(field, item, body, is_open=bool(slash))
    if high < low:
        high += field.size  # a range that wraps: 22-2 is 22, 23, 0, 1, 2
    return ((value - field.low) % field.size + field.low for value in range(low, high + 1, step))


def _parse_step(field: _Field, item: str, text: str) -> int:
    if not _is_number(text) or int(text) == 0:
        raise _BadItemError(f"the step of {item!r} is not a number above 0")
    if int(text) > field.size:
        raise _BadItemError(
            f"the step of {item!r} is larger than the field, which starts over each time; "
            "for a period that long use a timedelta schedule"
        )
    return int(text)


def _parse_range(field: _Field, item: str, body: str, *, is_open: bool) -> tuple[int, int]:
    """Return first and last value of an item without its step; ``a`` alone is open-ended before a step."""
    if body == "*":
        return field.low, field.low + field.size - 1
    first, dash, last = body.partition("-")
    low = _parse_value(field, item, first)
    if dash:
        return low, _parse_value(field, item, last)
    return low, (field.low + field.size - 1 if is_open else low)


def _parse_value(field: _Field, item: str, text: str) -> int:
    if text in field.names:
        return field.names[text]
    if not _is_number(text):
        near = difflib.get_close_matches(text, field.names, n=1) if text else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise _BadItemError(f"{item!r} is not understood{hint}")
    if not field.low <= int(text) <= field.high:
        raise _BadItemError(f"{text} is out of range")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4


def _show(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


# -- wall clock and instant --------------------------------------------------------------------------------------


def first_instant_of(wall: datetime, zone: tzinfo) -> datetime:
    """Return the first instant (UTC) at which the clock of ``zone`` reaches the naive ``wall``.

    A time shown twice gives its first showing; one that is skipped gives the first instant after the gap.
    """
    shown = _instants_of(wall, zone)
    return min(shown) if shown else _gap_end(wall, zone)


def _instants_of(wall: datetime, zone: tzinfo) -> list[datetime]:
    """Return the instants (UTC) at which the clock shows ``wall``: one; two when it is turned back; none in a gap."""
    first = wall.replace(tzinfo=zone, fold=0).astimezone(UTC)
    second = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    if first == second:
        return [first]
    return [instant for instant in (first, second) if _wall(instant, zone) == wall]


def _gap_end(wall: datetime, zone: tzinfo) -> datetime:
    """Return the instant the clock jumps over ``wall``, to the second, by halving the interval around it."""
    before, after = sorted(wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    while after - before > timedelta(seconds=1):
        middle = (before + (after - before) / 2).replace(microsecond=0)
        if _wall(middle, zone) < wall:
            before = middle
        else:
            after = middle
    return after


def _wall(instant: datetime, zone: tzinfo) -> datetime:
    return instant.astimezone(zone).replace(tzinfo=None, fold=0)


def _about_to_turn_back(instant: datetime, zone: tzinfo) -> timedelta:
    """Return by how much the clock will be turned back if it will then show less than at ``instant``; otherwise 0."""
    turned_back = _offset(instant, zone) - _offset(instant + _HORIZON, zone)
    if turned_back <= timedelta() or _offset(instant + turned_back, zone) == _offset(instant, zone):
        return timedelta()
    return turned_back


def _offset(instant: datetime, zone: tzinfo) -> timedelta:
    return instant.astimezone(zone).utcoffset() or timedelta()

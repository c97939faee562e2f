"""Cron against brute force: every minute around the clock changes of every zone of the time-zone database.

The model walks instant by instant and looks at the clock. An elapsed expression fires when the clock shows a match; a
fixed one when the clock's highest reading so far reaches or passes a match.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from zoneinfo import ZoneInfo, available_timezones

from hypothesis import given, settings
from hypothesis import strategies as st

from dflow.core.cron import parse

ZONES = sorted(available_timezones())
YEARS = range(1973, 2038)  # before, some offsets were not whole minutes
MINUTE = timedelta(minutes=1)


@dataclass(frozen=True)
class Expression:
    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    weekdays: frozenset[int]
    is_elapsed: bool

    def matches(self, wall: datetime) -> bool:
        if wall.minute not in self.minutes or wall.hour not in self.hours:
            return False
        by_month, by_week = wall.day in self.days, (wall.weekday() + 1) % 7 in self.weekdays
        if len(self.days) < 31 and len(self.weekdays) < 7:
            return by_month or by_week
        return by_month and by_week


Field = tuple[str, frozenset[int]]


def listed(span: range) -> st.SearchStrategy[Field]:
    """Some values, written one by one."""
    return st.sets(st.sampled_from(span), min_size=1, max_size=4).map(
        lambda values: (",".join(map(str, sorted(values))), frozenset(values))
    )


def field(span: range) -> st.SearchStrategy[Field]:
    """The text of a field and what it means, found without the parser."""
    stepped = st.integers(1, len(span) // 2).map(lambda step: (f"*/{step}", frozenset(span[::step])))
    ranged = st.tuples(st.sampled_from(span), st.sampled_from(span)).map(
        lambda ends: (
            f"{ends[0]}-{ends[1]}",
            frozenset(
                v for v in span if (ends[0] <= v <= ends[1]) or (ends[0] > ends[1] and not ends[1] < v < ends[0])
            ),
        )
    )
    return st.one_of(st.just(("*", frozenset(span))), stepped, ranged, listed(span))


@st.composite
def expressions(draw: st.DrawFn) -> Expression:
    # the hours in which clocks are changed are the interesting ones, and most days should count
    early: Field = ("0-4", frozenset(range(5)))
    any_day: Field = ("*", frozenset(range(1, 32)))
    any_weekday: Field = ("*", frozenset(range(7)))
    minute = draw(st.one_of(field(range(60)), listed(range(60))))
    hour = draw(st.one_of(st.just(early), field(range(24)), listed(range(5))))
    day = draw(st.one_of(st.just(any_day), st.just(any_day), field(range(1, 32))))
    weekday = draw(st.one_of(st.just(any_weekday), st.just(any_weekday), field(range(7))))
    return Expression(
        text=f"{minute[0]} {hour[0]} {day[0]} * {weekday[0]}",
        minutes=minute[1],
        hours=hour[1],
        days=day[1],
        weekdays=weekday[1],
        is_elapsed="*" in (minute[0][0], hour[0][0]) or len(minute[1]) == 60 or len(hour[1]) == 24,
    )


def clock_changes(zone: ZoneInfo, year: int) -> list[datetime]:
    """The UTC days of a year on which the offset changes."""
    days = [datetime(year, 1, 1, tzinfo=UTC) + timedelta(days=day) for day in range(366)]
    offsets = [day.astimezone(zone).utcoffset() for day in days]
    return [day for day, here, there in zip(days, offsets, offsets[1:], strict=False) if here != there]


def window(zone: ZoneInfo, start: datetime, hours: int) -> list[tuple[datetime, datetime]]:
    """Every minute from ``start`` on: the instant and what the clock shows."""
    instants = (start + minute * MINUTE for minute in range(hours * 60))
    return [(instant, instant.astimezone(zone).replace(tzinfo=None, fold=0)) for instant in instants]


def brute_force(expression: Expression, minutes: list[tuple[datetime, datetime]]) -> list[datetime]:
    """The ticks after the first minute."""
    ticks, highest = [], minutes[0][1]
    for instant, wall in minutes[1:]:
        if expression.is_elapsed:
            fires = expression.matches(wall)
        else:
            passed = range(1, int((wall - highest) / MINUTE) + 1)
            fires = any(expression.matches(highest + minute * MINUTE) for minute in passed)
            highest = max(highest, wall)
        if fires:
            ticks.append(instant)
    return ticks


def computed(expression: Expression, zone: ZoneInfo, after: datetime, until: datetime) -> Iterator[datetime]:
    cron = parse(expression.text)
    tick = cron.next_after(after, zone)
    while tick is not None and tick <= until:
        yield tick
        tick = cron.next_after(tick, zone)


def check(expression: Expression, zone: ZoneInfo, minutes: list[tuple[datetime, datetime]], random: Random) -> None:
    first, last = minutes[0][0], minutes[-1][0]
    expected = brute_force(expression, minutes)
    assert list(computed(expression, zone, first, last)) == expected, (expression.text, zone.key, first)
    cron = parse(expression.text)
    for _ in range(4):
        instant = first + timedelta(seconds=random.randrange(int((last - first).total_seconds())))
        after, before = [t for t in expected if t > instant], [t for t in expected if t <= instant]
        if after:
            assert cron.next_after(instant, zone) == after[0], (expression.text, zone.key, instant)
        if before:
            assert cron.latest_at(instant, zone) == before[-1], (expression.text, zone.key, instant)


@settings(max_examples=150, deadline=None)
@given(
    expression=expressions(),
    zone=st.sampled_from(ZONES).map(ZoneInfo),
    year=st.sampled_from(YEARS),
    random=st.randoms(use_true_random=False),
    pick=st.integers(0, 10),
)
def test_around_the_clock_changes_of_any_zone_and_year(
    expression: Expression, zone: ZoneInfo, year: int, random: Random, pick: int
) -> None:
    changes = clock_changes(zone, year) or [datetime(year, 6, 1, tzinfo=UTC)]
    start = changes[pick % len(changes)] - timedelta(hours=random.randrange(1, 12))
    check(expression, zone, window(zone, start, 48), random)


NIGHTLY = Expression(
    "10,40 0-4 * * *", frozenset({10, 40}), frozenset(range(5)), frozenset(range(1, 32)), frozenset(range(7)), False
)
QUARTERS = Expression(
    "*/20 1-3 * * *", frozenset({0, 20, 40}), frozenset({1, 2, 3}), frozenset(range(1, 32)), frozenset(range(7)), True
)


def test_every_zone() -> None:
    """One clock change of every zone, of a year that differs from zone to zone, a fixed and an elapsed expression."""
    for number, name in enumerate(ZONES):
        zone, random = ZoneInfo(name), Random(name)
        years = (YEARS[(number * 7 + 13 * step) % len(YEARS)] for step in range(6))
        change = next((change for year in years for change in clock_changes(zone, year)), None)
        if change is not None:
            minutes = window(zone, change - timedelta(hours=2), 28)
            check(NIGHTLY, zone, minutes, random)
            check(QUARTERS, zone, minutes, random)

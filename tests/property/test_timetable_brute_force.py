"""Timetables against brute force: the ticks written down one by one, and the run picked from the list."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

from hypothesis import given, settings
from hypothesis import strategies as st

from dflow.core.spec import ScheduleSpec
from dflow.core.timetable import DueRun, next_run, ticks_between

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
MINUTES = st.integers(0, 60 * 24 * 20).map(lambda minutes: EPOCH + timedelta(minutes=minutes))
ZONES = sorted(available_timezones())


def listed(schedule: ScheduleSpec, start: datetime | None) -> list[datetime]:
    """Every tick of 26 days, found minute by minute (all these schedules tick on whole minutes)."""
    minutes = [EPOCH + timedelta(minutes=minute) for minute in range(60 * 24 * 26)]
    if schedule.kind == "cron":
        assert schedule.expression is not None
        minute, hour, *_ = schedule.expression.split()
        return [m for m in minutes if m.minute == int(minute) and (hour == "*" or m.hour == int(hour))]
    assert schedule.interval_seconds is not None
    anchor = start or datetime(1970, 1, 1, tzinfo=UTC)
    return [m for m in minutes if (m - anchor).total_seconds() % schedule.interval_seconds == 0]


SCHEDULES = st.one_of(
    st.integers(0, 59).map(lambda m: ScheduleSpec(kind="cron", expression=f"{m} * * * *")),
    st.tuples(st.integers(0, 59), st.integers(0, 23)).map(
        lambda hm: ScheduleSpec(kind="cron", expression=f"{hm[0]} {hm[1]} * * *")
    ),
    st.sampled_from([7, 60, 90, 24 * 60, 3 * 24 * 60]).map(
        lambda minutes: ScheduleSpec(kind="delta", interval_seconds=minutes * 60.0)
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    schedule=SCHEDULES,
    start=st.none() | MINUTES,
    end=st.none() | MINUTES,
    last=st.none() | MINUTES,
    now=MINUTES,
    catchup=st.booleans(),
)
def test_the_next_run(
    schedule: ScheduleSpec,
    start: datetime | None,
    end: datetime | None,
    last: datetime | None,
    now: datetime,
    catchup: bool,
) -> None:
    ticks = listed(schedule, start)
    possible = [t for t in ticks if (start is None or t >= start) and (last is None or t > last)]
    if start is None and last is None:
        possible = [t for t in possible if t >= now]
    missed = [t for t in possible if t <= now]
    expected = missed[-1] if missed and not catchup else possible[0]
    run = next_run(
        schedule,
        last=DueRun(logical_date=last, interval_start=last, interval_end=last, run_after=last) if last else None,
        start_date=start,
        end_date=end,
        catchup=catchup,
        now=now,
    )
    assert (run.run_after if run else None) == (expected if end is None or expected <= end else None)
    if run is not None:
        assert run.logical_date == run.interval_start == run.interval_end == run.run_after
        assert run.run_after.tzinfo is UTC


@settings(max_examples=60, deadline=None)
@given(schedule=SCHEDULES, start=MINUTES, now=MINUTES)
def test_catchup_visits_every_tick_once_and_in_order(schedule: ScheduleSpec, start: datetime, now: datetime) -> None:
    expected = [tick for tick in listed(schedule, start) if tick >= start][:50]
    visited, last = [], None
    while len(visited) < len(expected):
        last = next_run(schedule, last=last, start_date=start, end_date=None, catchup=True, now=now)
        assert last is not None
        visited.append(last.run_after)
    assert visited == expected
    assert list(ticks_between(schedule, start, visited[-1], start_date=start)) == expected


@settings(max_examples=150, deadline=None)
@given(
    zone=st.sampled_from(ZONES).map(ZoneInfo),
    start=st.datetimes(datetime(1973, 1, 1), datetime(2037, 1, 1)).map(lambda d: d.replace(second=0, microsecond=0)),
    days=st.sampled_from([1, 1, 2, 7]),
)
def test_whole_days_keep_their_wall_time_in_every_zone(zone: ZoneInfo, start: datetime, days: int) -> None:
    """Over a year each tick shows the time of day of the start, or is the first instant after that time was skipped."""
    schedule = ScheduleSpec(kind="delta", interval_seconds=days * 86400.0, timezone=zone.key)
    begin = start.replace(tzinfo=zone).astimezone(UTC)
    wall = begin.astimezone(zone).replace(tzinfo=None, fold=0)  # differs from start if that does not exist
    ticks = list(ticks_between(schedule, begin - timedelta(days=2), begin + timedelta(days=366), start_date=begin))
    assert ticks == sorted(set(ticks))
    for tick in ticks:
        shown = tick.astimezone(zone).replace(tzinfo=None, fold=0)
        before = (tick - timedelta(minutes=1)).astimezone(zone).replace(tzinfo=None, fold=0)
        distance = (shown - wall) % timedelta(days=days)
        is_exact = distance == timedelta()
        assert is_exact or shown - before > distance + timedelta(minutes=1) - timedelta(microseconds=1)
        if is_exact:  # the first showing of it
            assert shown.replace(tzinfo=zone, fold=0).astimezone(UTC) == tick
    skipped = sum(1 for a, b in zip(ticks, ticks[1:], strict=False) if b - a > timedelta(days=days, hours=3))
    assert skipped <= 1  # at most a day the zone itself left out

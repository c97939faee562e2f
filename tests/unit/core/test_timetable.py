"""Timetables case by case: Airflow 3's defaults for every kind of schedule."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from dflow.core.errors import DagDefinitionError
from dflow.core.spec import ScheduleSpec
from dflow.core.timetable import DueRun, next_run, ticks_between, zone_for

NOW = datetime(2026, 11, 22, 10, 30, tzinfo=UTC)
DAILY = ScheduleSpec(kind="cron", expression="0 3 * * *")
HOUR = ScheduleSpec(kind="delta", interval_seconds=3600)


def day(number: int, hour: int = 3, minute: int = 0) -> datetime:
    return datetime(2026, 11, number, hour, minute, tzinfo=UTC)


def ran(at: datetime) -> DueRun:
    return DueRun(logical_date=at, interval_start=at, interval_end=at, run_after=at)


def due(
    schedule: ScheduleSpec,
    last: DueRun | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
    catchup: bool = False,
    now: datetime = NOW,
) -> datetime | None:
    run = next_run(schedule, last=last, start_date=start, end_date=end, catchup=catchup, now=now)
    return run.run_after if run else None


def test_no_schedule() -> None:
    assert due(ScheduleSpec(), start=day(1)) is None
    assert list(ticks_between(ScheduleSpec(), day(1), day(9))) == []


def test_a_cron_run_has_one_instant_for_everything() -> None:
    run = next_run(DAILY, last=None, start_date=day(20), end_date=None, catchup=True, now=NOW)
    assert run == ran(day(20))


def test_without_catchup_only_the_latest_missed_tick_runs() -> None:
    assert due(DAILY, start=day(1)) == day(22)
    assert due(DAILY, start=day(1), last=ran(day(10))) == day(22)
    assert due(DAILY, start=day(1), last=ran(day(22))) == day(23)


def test_with_catchup_every_tick_runs() -> None:
    assert due(DAILY, start=day(1), catchup=True) == day(1)
    assert due(DAILY, start=day(1, 4), catchup=True) == day(2)
    assert due(DAILY, start=day(1), last=ran(day(10)), catchup=True) == day(11)


def test_without_a_start_date_the_first_run_is_the_next_tick() -> None:
    for catchup in (False, True):
        assert due(DAILY, catchup=catchup) == day(23)
        assert due(DAILY, catchup=catchup, now=day(22)) == day(22)
        assert due(DAILY, last=ran(day(22)), catchup=catchup) == day(23)
    assert due(DAILY, last=ran(day(20))) == day(22)
    assert due(DAILY, last=ran(day(20)), catchup=True) == day(21)


def test_a_start_date_in_the_future_is_waited_for() -> None:
    assert due(DAILY, start=day(25, 0)) == day(25)
    assert due(DAILY, start=day(25), last=ran(day(1))) == day(25)


def test_the_end_date_is_inclusive() -> None:
    assert due(DAILY, start=day(1), end=day(22)) == day(22)
    assert due(DAILY, start=day(1), end=day(22) - timedelta(microseconds=1)) is None
    assert due(DAILY, start=day(1), end=day(10), catchup=True) == day(1)
    assert due(DAILY, start=day(1), end=day(10), last=ran(day(10)), catchup=True) is None


def test_cron_in_a_time_zone() -> None:
    berlin = ScheduleSpec(kind="cron", expression="0 3 * * *", timezone="Europe/Berlin")
    assert due(berlin, start=day(1)) == day(22, 2)


def test_once() -> None:
    once = ScheduleSpec(kind="once")
    assert due(once) == NOW
    assert due(once, start=day(1)) == day(1)
    assert due(once, start=day(25)) == day(25)
    assert due(once, start=day(25), end=day(24)) is None
    assert due(once, start=day(1), last=ran(day(1))) is None


def test_continuous_runs_again_at_once_over_what_passed() -> None:
    continuous = ScheduleSpec(kind="continuous")
    first = next_run(continuous, last=None, start_date=day(1), end_date=None, catchup=False, now=NOW)
    assert first == DueRun(logical_date=NOW, interval_start=day(1), interval_end=NOW, run_after=NOW)
    later = NOW + timedelta(minutes=5)
    second = next_run(continuous, last=first, start_date=day(1), end_date=None, catchup=False, now=later)
    assert second == DueRun(logical_date=later, interval_start=NOW, interval_end=later, run_after=later)
    assert due(continuous) == NOW
    assert due(continuous, start=day(25)) == day(25)
    assert due(continuous, end=day(22)) is None


def test_continuous_runs_never_share_a_logical_date() -> None:
    continuous = ScheduleSpec(kind="continuous")
    last = None
    for now in (NOW, NOW, NOW - timedelta(seconds=1)):  # a clock that stands still, or is set back
        run = next_run(continuous, last=last, start_date=None, end_date=None, catchup=False, now=now)
        assert run is not None
        assert last is None or run.logical_date > last.logical_date
        last = run


def test_delta_counts_from_the_start_date() -> None:
    start = day(20, 9, 7)
    assert due(HOUR, start=start, catchup=True) == start
    assert due(HOUR, start=start, last=ran(start), catchup=True) == day(20, 10, 7)
    assert due(HOUR, start=start) == day(22, 10, 7)
    assert due(HOUR, start=start, last=ran(day(22, 10, 7))) == day(22, 11, 7)


def test_delta_without_a_start_date_has_fixed_ticks_too() -> None:
    """Else a DAG that is parsed again before its first run would never have one."""
    assert due(HOUR) == day(22, 11) == due(HOUR, now=NOW + timedelta(minutes=20))
    weekly = ScheduleSpec(kind="delta", interval_seconds=7 * 86400)
    assert due(weekly) == day(26, 0)


def test_whole_days_follow_the_wall_clock() -> None:
    zone = zone_for("Europe/Berlin")
    schedule = ScheduleSpec(kind="delta", interval_seconds=86400, timezone="Europe/Berlin")
    start = datetime(2026, 3, 27, 2, 30, tzinfo=zone)
    got = list(ticks_between(schedule, start, start + timedelta(days=4), start_date=start))
    assert [tick.astimezone(zone).strftime("%d %H:%M") for tick in got] == [
        "27 02:30",
        "28 02:30",
        "29 03:00",
        "30 02:30",
        "31 02:30",
    ]


def test_ticks_between_is_inclusive() -> None:
    assert list(ticks_between(DAILY, day(1), day(3))) == [day(1), day(2), day(3)]
    assert list(ticks_between(DAILY, day(1, 3, 1), day(3, 2, 59))) == [day(2)]
    assert list(ticks_between(HOUR, day(1, 0), day(1, 1), start_date=day(9, 0, 10))) == [day(1, 0, 10)]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ScheduleSpec(kind="weekly"), "unknown kind of schedule 'weekly'; use one of none, once"),
        (ScheduleSpec(kind="cron"), "needs an expression"),
        (ScheduleSpec(kind="delta"), "needs interval_seconds"),
        (ScheduleSpec(kind="delta", interval_seconds=0), "at least one second"),
        (ScheduleSpec(kind="delta", interval_seconds=-60), "at least one second"),
        (ScheduleSpec(kind="delta", interval_seconds=float("nan")), "at least one second"),
        (ScheduleSpec(kind="delta", interval_seconds=1e300), "cannot work"),
        (ScheduleSpec(kind="cron", expression="0 0 31 2 *"), "never fires"),
        (ScheduleSpec(kind="cron", expression="@daily", timezone="Mars/Olympus"), "unknown time zone 'Mars/Olympus'"),
        (ScheduleSpec(kind="cron", expression="@daily", timezone="../etc"), "unknown time zone"),
        (ScheduleSpec(kind="cron", expression="@daily", timezone="America"), "unknown time zone"),
        (ScheduleSpec(kind="cron", expression="@daily", timezone=""), "unknown time zone"),
    ],
)
def test_what_is_refused(schedule: ScheduleSpec, message: str) -> None:
    with pytest.raises(DagDefinitionError, match=message):
        due(schedule, start=day(1))


def test_the_end_of_the_calendar_is_no_error() -> None:
    century = ScheduleSpec(kind="delta", interval_seconds=36_500 * 86400.0)
    assert due(century, start=day(1), last=ran(datetime(9990, 1, 1, tzinfo=UTC)), catchup=True) is None


def test_the_latest_missed_tick_while_the_clock_shows_an_hour_again() -> None:
    """At the second 02:15 the daily run of 02:30 has been, though the clock shows less."""
    schedule = ScheduleSpec(kind="delta", interval_seconds=86400, timezone="Europe/Berlin")
    start = datetime(2026, 10, 20, 2, 30, tzinfo=zone_for("Europe/Berlin"))
    assert due(schedule, start=start, now=datetime(2026, 10, 25, 1, 15, tzinfo=UTC)) == datetime(
        2026, 10, 25, 0, 30, tzinfo=UTC
    )

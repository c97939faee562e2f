"""Cron expressions: what is read, what is refused and how, and the policy for clock changes by name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from dflow.core.cron import PRESETS, parse, validate_cron
from dflow.core.errors import DagDefinitionError

BERLIN = ZoneInfo("Europe/Berlin")
LORD_HOWE = ZoneInfo("Australia/Lord_Howe")  # half an hour of summer time
APIA = ZoneInfo("Pacific/Apia")  # 30 December 2011 did not exist
MONROVIA = ZoneInfo("Africa/Monrovia")  # 44 minutes and 30 seconds behind until 7 January 1972
KWAJALEIN = ZoneInfo("Pacific/Kwajalein")


def at(text: str, zone: ZoneInfo | None = None) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone or UTC)


def ticks(expression: str, zone: ZoneInfo, start: str, count: int) -> list[str]:
    """The next ticks after a UTC instant, as the wall clock shows them."""
    cron, instant, shown = parse(expression), at(start), []
    for _ in range(count):
        following = cron.next_after(instant, zone)
        assert following is not None
        shown.append(following.astimezone(zone).strftime("%d %H:%M %z"))
        instant = following
    return shown


def test_normal_form_and_presets() -> None:
    assert validate_cron("  0   3 * JAN  Mon-FRI ") == "0 3 * jan mon-fri"
    assert {validate_cron(preset) for preset in PRESETS} == set(PRESETS.values())
    assert validate_cron("@Daily") == "0 0 * * *"


@pytest.mark.parametrize(
    ("field", "expression", "values"),
    [
        ("minutes", "*/15 * * * *", (0, 15, 30, 45)),
        ("minutes", "5/20 * * * *", (5, 25, 45)),
        ("minutes", "1,3,2-4 * * * *", (1, 2, 3, 4)),
        ("hours", "0 8-18/3 * * *", (8, 11, 14, 17)),
        ("hours", "0 22-2 * * *", (0, 1, 2, 22, 23)),
        ("months", "0 0 1 jan,JUL-sep *", (1, 7, 8, 9)),
        ("months", "0 0 1 nov-feb *", (1, 2, 11, 12)),
        ("months", "0 0 1 */12 *", (1,)),
        ("weekdays", "0 0 * * 7", (0,)),
        ("weekdays", "0 0 * * 5-7", (0, 5, 6)),
        ("weekdays", "0 0 * * 0-7", (0, 1, 2, 3, 4, 5, 6)),
        ("weekdays", "0 0 * * sat-mon", (0, 1, 6)),
        ("weekdays", "0 0 * * 7-2", (0, 1, 2)),
        ("days", "0 0 */10 * *", (1, 11, 21, 31)),
    ],
)
def test_fields(field: str, expression: str, values: tuple[int, ...]) -> None:
    assert getattr(parse(expression), field) == values


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "has 0 fields, expected 5: minute hour day-of-month month day-of-week"),
        ("* * * *", "has 4 fields"),
        ("0 0 12 * * *", "has 6 fields, expected 5.*seconds and years are not supported"),
        ("60 * * * *", r"minute field \(0-59\): 60 is out of range"),
        ("* 24 * * *", r"hour field \(0-23\): 24 is out of range"),
        ("* * 0 * *", r"day of month field \(1-31\): 0 is out of range"),
        ("* * * 13 *", r"month field \(1-12 or jan-dec\): 13 is out of range"),
        ("* * * * 8", r"day of week field \(0-7 or sun-sat\): 8 is out of range"),
        ("* * * * mno", "'mno' is not understood .did you mean 'mon'?"),
        ("* * * janu *", "did you mean 'jan'?"),
        ("* * l * *", "'l' is not understood"),
        ("* * * * mon#1", "'mon#1' is not understood"),
        ("1,,2 * * * *", "'' is not understood"),
        ("1- * * * *", "'1-' is not understood"),
        ("-1 * * * *", "'-1' is not understood"),
        ("1.5 * * * *", "'1.5' is not understood"),
        ("² * * * *", "'²' is not understood"),
        ("*/0 * * * *", "the step of '\\*/0' is not a number above 0"),
        ("*/x * * * *", "the step of '\\*/x' is not a number"),
        ("*/90 * * * *", "larger than the field.*use a timedelta schedule"),
        ("0 0 31 2 *", "never fires: no month of 2 has a day 31"),
        ("0 0 31 4,6,9,11 *", "never fires"),
        ("0 0 30,31 feb *", "never fires: no month of 2 has a day 30,31"),
        ("@dayly", "not a cron preset; did you mean '@daily'"),
        ("@once", "not a cron preset"),
    ],
)
def test_what_is_refused(expression: str, message: str) -> None:
    with pytest.raises(DagDefinitionError, match=message):
        validate_cron(expression)


def test_either_day_field_when_both_are_restricted() -> None:
    assert ticks("0 0 13 * fri", UTC, "2026-11-01T00:00", 4) == [
        "06 00:00 +0000",
        "13 00:00 +0000",
        "20 00:00 +0000",
        "27 00:00 +0000",
    ]
    assert ticks("0 0 13 * fri", UTC, "2026-11-28T00:00", 3)[1:] == ["11 00:00 +0000", "13 00:00 +0000"]
    assert ticks("0 0 * * fri", UTC, "2026-11-01T00:00", 2) == ["06 00:00 +0000", "13 00:00 +0000"]
    assert ticks("0 0 30 2 mon", UTC, "2026-02-01T00:00", 2) == ["02 00:00 +0000", "09 00:00 +0000"]


def test_the_29th_of_february_may_be_eight_years_away() -> None:
    cron = parse("0 0 29 2 *")
    assert cron.next_after(at("2096-03-01T00:00"), UTC) == at("2104-02-29T00:00")
    assert cron.latest_at(at("2104-02-28T00:00"), UTC) == at("2096-02-29T00:00")


def test_strictly_after_and_at_or_before() -> None:
    cron = parse("0 * * * *")
    assert cron.next_after(at("2026-01-01T00:00"), UTC) == at("2026-01-01T01:00")
    assert cron.next_after(at("2026-01-01T00:00") - timedelta.resolution, UTC) == at("2026-01-01T00:00")
    assert cron.latest_at(at("2026-01-01T00:00"), UTC) == at("2026-01-01T00:00")
    assert cron.latest_at(at("2026-01-01T00:00") - timedelta.resolution, UTC) == at("2025-12-31T23:00")


def test_the_ends_of_the_calendar() -> None:
    cron = parse("@yearly")
    assert cron.next_after(datetime.max.replace(tzinfo=UTC), UTC) is None
    assert cron.next_after(at("9999-06-01T00:00"), BERLIN) is None
    assert cron.latest_at(datetime.min.replace(tzinfo=UTC) + timedelta(minutes=5), BERLIN) is None


def test_a_fixed_time_that_is_skipped_runs_once_after_the_gap() -> None:
    assert ticks("30 2 * * *", BERLIN, "2026-03-28T00:00", 3) == ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200"]
    assert ticks("0,15,30 2,3 29 3 *", BERLIN, "2026-03-28T23:00", 3) == [
        "29 03:00 +0200",
        "29 03:15 +0200",
        "29 03:30 +0200",
    ]


def test_a_fixed_time_that_comes_twice_runs_the_first_time() -> None:
    assert ticks("30 2 * * *", BERLIN, "2026-10-24T12:00", 2) == ["25 02:30 +0200", "26 02:30 +0100"]
    # also when asked between the two
    assert ticks("30 2 * * *", BERLIN, "2026-10-25T00:45", 1) == ["26 02:30 +0100"]
    assert ticks("30 2 * * *", BERLIN, "2026-10-25T01:15", 1) == ["26 02:30 +0100"]


def test_an_hourly_job_follows_real_time() -> None:
    assert ticks("@hourly", BERLIN, "2026-03-28T23:30", 3) == ["29 01:00 +0100", "29 03:00 +0200", "29 04:00 +0200"]
    assert ticks("@hourly", BERLIN, "2026-10-24T23:30", 3) == ["25 02:00 +0200", "25 02:00 +0100", "25 03:00 +0100"]


def test_minutes_of_one_hour_run_in_both_of_them_or_in_none() -> None:
    assert ticks("*/30 2 * * *", BERLIN, "2026-10-24T12:00", 5) == [
        "25 02:00 +0200",
        "25 02:30 +0200",
        "25 02:00 +0100",
        "25 02:30 +0100",
        "26 02:00 +0100",
    ]
    assert ticks("*/30 2 * * *", BERLIN, "2026-03-28T12:00", 1) == ["30 02:00 +0200"]
    # asked within the first of the two hours, for a date far away otherwise
    assert ticks("*/30 2 25 10 *", BERLIN, "2026-10-25T00:59", 1) == ["25 02:00 +0100"]


def test_half_an_hour_of_summer_time() -> None:
    assert ticks("*/20 * * * *", LORD_HOWE, "2026-10-03T15:15", 3) == [
        "04 02:40 +1100",
        "04 03:00 +1100",
        "04 03:20 +1100",
    ]
    assert ticks("10 2 * * *", LORD_HOWE, "2026-10-03T15:15", 1) == ["04 02:30 +1100"]


def test_a_day_that_does_not_exist() -> None:
    assert ticks("0 12 * * *", APIA, "2011-12-29T12:00", 3) == ["29 12:00 -1000", "31 00:00 +1400", "31 12:00 +1400"]
    assert ticks("0 * * * *", APIA, "2011-12-30T08:30", 2) == ["29 23:00 -1000", "31 00:00 +1400"]
    assert ticks("* 5 30 12 *", APIA, "2011-12-30T08:30", 1) == ["30 05:00 +1400"]


def test_offsets_of_half_minutes() -> None:
    """The gap of 7 January 1972 ended at 00:44:30."""
    assert ticks("@hourly", MONROVIA, "1972-01-07T00:00", 2) == ["07 01:00 +0000", "07 02:00 +0000"]
    assert ticks("*/10 * * * *", MONROVIA, "1972-01-07T00:44", 2) == ["07 00:50 +0000", "07 01:00 +0000"]
    gap_end = parse("20 0 * * *").next_after(at("1972-01-06T12:00"), MONROVIA)
    assert gap_end == at("1972-01-07T00:44:30")
    assert parse("20 0 * * *").latest_at(at("1972-01-07T12:00"), MONROVIA) == gap_end
    assert parse("20 0 * * *").latest_at(at("1972-01-07T00:44:29"), MONROVIA) == at("1972-01-06T00:20", MONROVIA)


def test_a_day_that_came_twice() -> None:
    """Kwajalein put its clock back by 23 hours at the end of September 1969."""
    first = ticks("30 12 * * *", KWAJALEIN, "1969-09-29T12:00", 3)
    assert first == ["30 12:30 +1100", "01 12:30 -1200", "02 12:30 -1200"]
    hours = ticks("@hourly", KWAJALEIN, "1969-09-30T11:30", 4)
    assert hours == ["30 23:00 +1100", "30 01:00 -1200", "30 02:00 -1200", "30 03:00 -1200"]


def test_ticks_half_a_minute_apart() -> None:
    """After a gap that ends between two minutes, in both directions."""
    cron = parse("20,45 0 * * *")
    pair = [at("1972-01-07T00:44:30"), at("1972-01-07T00:45:00")]
    assert cron.next_after(pair[0], MONROVIA) == pair[1]
    for seconds in range(0, 7200, 7):
        assert cron.latest_at(pair[1] + timedelta(seconds=seconds), MONROVIA) == pair[1]
    for seconds in range(30):
        assert cron.latest_at(pair[0] + timedelta(seconds=seconds), MONROVIA) == pair[0]

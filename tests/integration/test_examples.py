"""The examples, run in one process through the planner and runner of the real thing."""

from __future__ import annotations

import csv
import importlib
import zoneinfo
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

import dflow.examples
from dflow.core.states import RunState, TaskState
from dflow.runtime import loader
from dflow.runtime.inline import InlineRun, run_dag

FOLDER = Path(dflow.examples.__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
ENDS_IN_FAILURE = {"failing"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DFLOW_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tzdata_only() -> Iterator[None]:
    """Have zoneinfo read the package's data too, not the machine's, which may be of another version."""
    before = zoneinfo.TZPATH
    zoneinfo.reset_tzpath([])
    ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath(before)
    ZoneInfo.clear_cache()


def run(name: str, conf: dict[str, Any] | None = None) -> InlineRun:
    (dag,) = loader.load_dags(FOLDER / f"{name}.py", bundle_root=FOLDER).dags.values()
    return run_dag(dag, conf=conf)


@pytest.mark.parametrize("name", FILES)
def test_every_example_ends_as_it_says(name: str) -> None:
    conf = {"from_year": 2020, "to_year": 2021} if name == "tz_report" else None
    expected = RunState.FAILED if name in ENDS_IN_FAILURE else RunState.SUCCESS
    assert run(name, conf).state == expected


@pytest.mark.parametrize("name", FILES)
def test_every_example_teaches(name: str) -> None:
    loaded = loader.load_dags(FOLDER / f"{name}.py", bundle_root=FOLDER)
    (dag,) = loaded.dags.values()
    assert dag.doc_md
    assert "example" in dag.tags
    assert dag.is_paused_upon_creation is (name == "schedule_time_zone")
    assert dag.dag_id == (name if name == "tz_report" else f"example_{name}")
    imports = [
        line
        for line in (FOLDER / f"{name}.py").read_text().splitlines()
        if line.startswith("from dflow") or "airflow" in line
    ]
    assert all(line.startswith("from dflow import ") for line in imports)


def test_the_failing_example_has_a_cause() -> None:
    result = run("failing")
    assert result.states["divide"] == TaskState.FAILED
    assert result.states["tell"] == TaskState.UPSTREAM_FAILED
    assert "ReportError: cannot average 10 over 0 rows" in str(result.outcomes["divide"].cause)


def test_trigger_rules_end_as_their_docstring_says() -> None:
    states = run("trigger_rules").states
    assert states == {
        "make_room": TaskState.SUCCESS,
        "work": TaskState.FAILED,
        "publish": TaskState.UPSTREAM_FAILED,
        "alert": TaskState.SUCCESS,
        "clean_up": TaskState.SUCCESS,
    }


def test_params_reach_templates_and_tasks() -> None:
    result = run("templates_and_params", {"city": "Oslo", "days": 2})
    plan = result.xcom("plan")
    assert (plan["city"], plan["days"]) == ("Oslo", 2)
    assert result.xcom("show") == "Oslo, day 2"


def test_the_report_has_every_clock_change_and_no_other(home: Path, tzdata_only: None) -> None:
    """Against the standard library's reader of the same data, asked for every day of the years."""
    result = run("tz_report", {"from_year": 2014, "to_year": 2017, "output_dir": str(home / "out")})
    assert result.state == RunState.SUCCESS
    with (home / "out" / "clock_changes.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    found = Counter({(int(row["year"]), row["region"]): int(row["changes"]) for row in rows})
    tz_report: Any = importlib.import_module("dflow.examples.tz_report")
    expected: Counter[tuple[int, str]] = Counter()
    for names in result.xcom("list_zones"):
        for name in names:
            for year, changes in changes_by_day(name, 2014, 2017).items():
                expected[year, tz_report.region_of(name)] += changes
    assert found == expected
    assert all(int(row["forward"]) + int(row["back"]) == int(row["changes"]) for row in rows)
    report = (home / "out" / "report.md").read_text()
    assert f"changed their clocks {expected.total()} times" in report


@pytest.mark.parametrize(
    "name",
    [
        "Europe/Berlin",  # a rule in the footer
        "Europe/Dublin",  # its winter is the exception
        "America/Nuuk",  # changes on the day before, in local time
        "Asia/Gaza",  # a rule with an hour beyond the day
        "America/Santiago",  # the south
        "Australia/Lord_Howe",  # half an hour
        "Africa/Casablanca",  # listed far into the future
        "Asia/Tokyo",
        "UTC",
    ],
)
def test_rules_are_followed_into_the_future(name: str, tzdata_only: None) -> None:
    tz_report: Any = importlib.import_module("dflow.examples.tz_report")
    changes = tz_report.clock_changes(tz_report.read_zone(name), 2045)
    by_year = Counter(instant.year for instant, _ in changes if 2024 <= instant.year <= 2045)
    assert by_year == +changes_by_day(name, 2024, 2045)
    for instant, seconds in changes:
        if 2024 <= instant.year <= 2045:
            at = instant.replace(tzinfo=UTC)
            assert offset(name, at) - offset(name, at - timedelta(seconds=1)) == timedelta(seconds=seconds)


def test_the_default_place_of_the_report_is_below_the_home(home: Path) -> None:
    directory = Path(run("tz_report", {"from_year": 2020, "to_year": 2020}).xcom("write_report"))
    assert directory.is_relative_to(home / "reports" / "tz_report")
    assert sorted(file.name for file in directory.iterdir()) == ["clock_changes.csv", "report.md"]


def offset(name: str, at: datetime) -> timedelta:
    result = at.astimezone(ZoneInfo(name)).utcoffset()
    assert result is not None
    return result


def changes_by_day(name: str, from_year: int, to_year: int) -> Counter[int]:
    """Count the days at whose end the offset is another than the day before; no zone changes twice in a day."""
    counts: Counter[int] = Counter()
    at, end = datetime(from_year - 1, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(to_year, 12, 31, 23, tzinfo=UTC)
    before = offset(name, at)
    while at < end:
        at += timedelta(days=1)
        now = offset(name, at)
        counts[at.year] += now != before
        before = now
    return counts

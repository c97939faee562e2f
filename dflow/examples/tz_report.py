"""How often does the world change its clocks? An ETL over the IANA time-zone database.

    list_zones ─┬─> parse_0 ─┬─> aggregate ─> write_report
                ├─> ...      │
                └─> parse_7 ─┘

The input is the database itself, as the `tzdata` package ships it: about 600 compiled zone files (TZif, RFC 9636).

1. `list_zones` reads the names of all zones and deals them into eight hands of about the same size.
2. Eight `parse_N` tasks, made in a loop, run side by side. Each reads its zones' files and counts, by region and year,
   how often the clocks went forward or back.
3. `aggregate` adds the eight results up.
4. `write_report` writes a CSV with every number and a Markdown file with the story, and logs where they are.

Try it, with other years:

    dflow dags trigger tz_report --wait
    dflow dags trigger tz_report --wait --conf '{"from_year": 1900, "to_year": 1950}'

What is counted: instants at which a zone's offset from UTC changes. A change of the abbreviation or of the daylight
flag alone moves no clock and does not count. Years are those of the instant in UTC. Names that are links to another
zone (US/Eastern) count like any other, as the database lists them.
"""

from __future__ import annotations

import csv
import logging
import os
import re
import struct
from collections import Counter
from datetime import datetime, timedelta
from importlib import resources
from pathlib import Path

from dflow import Param, dag, task

log = logging.getLogger(__name__)

HANDS = 8
FIRST_YEAR, LAST_YEAR = 1850, 2100
EPOCH = datetime(1970, 1, 1)


@dag(
    dag_id="tz_report",
    schedule=None,
    is_paused_upon_creation=False,
    tags=["example", "etl"],
    doc_md=__doc__,
    params={
        "from_year": Param(
            1970, type="integer", minimum=FIRST_YEAR, maximum=LAST_YEAR, description="The first year that is counted."
        ),
        "to_year": Param(
            2037, type="integer", minimum=FIRST_YEAR, maximum=LAST_YEAR, description="The last year that is counted."
        ),
        "output_dir": Param(
            None,
            type=["null", "string"],
            description="Where the reports are written, on the machine of the worker. "
            "Default: $DFLOW_HOME/reports/tz_report/<run id>.",
        ),
    },
)
def tz_report():
    @task
    def list_zones() -> list[list[str]]:
        """Deal the names of all zones into hands: zone 0 to hand 0, zone 1 to hand 1, ..."""
        names = (resources.files("tzdata") / "zones").read_text(encoding="utf-8").split()
        log.info("%d zones in %d hands", len(names), HANDS)
        return [names[hand::HANDS] for hand in range(HANDS)]

    @task
    def parse(hands: list[list[str]], hand: int, params=None) -> dict:
        """Count the changes of one hand: {"zones": {region: n}, "changes": {region: {year: [forward, back]}}}."""
        zones: Counter[str] = Counter()
        changes: dict[str, dict[str, list[int]]] = {}
        for name in hands[hand]:
            region = region_of(name)
            zones[region] += 1
            for instant, seconds in clock_changes(read_zone(name), params["to_year"]):
                if params["from_year"] <= instant.year <= params["to_year"]:
                    cell = changes.setdefault(region, {}).setdefault(str(instant.year), [0, 0])
                    cell[0 if seconds > 0 else 1] += 1
        log.info("parsed %d zones", zones.total())
        return {"zones": dict(zones), "changes": changes}

    @task
    def aggregate(parts: list[dict]) -> dict:
        """Add the parts up: {"zones": {region: n}, "rows": [[year, region, forward, back], ...]}, sorted."""
        zones: Counter[str] = Counter()
        totals: dict[tuple[int, str], list[int]] = {}
        for part in parts:
            zones.update(part["zones"])
            for region, years in part["changes"].items():
                for year, (forward, back) in years.items():
                    cell = totals.setdefault((int(year), region), [0, 0])
                    cell[0] += forward
                    cell[1] += back
        rows = [[year, region, *totals[year, region]] for year, region in sorted(totals)]
        log.info("%d zones, %d clock changes", zones.total(), sum(map(sum, totals.values())))
        return {"zones": dict(sorted(zones.items())), "rows": rows}

    @task
    def write_report(result: dict, params=None, run_id=None) -> str:
        """Write the CSV and the Markdown file and return the directory they are in."""
        directory = Path(params["output_dir"] or default_output_dir(run_id)).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "clock_changes.csv").open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(["year", "region", "forward", "back", "changes"])
            writer.writerows([*row, row[2] + row[3]] for row in result["rows"])
        report = directory / "report.md"
        report.write_text(as_markdown(result, params["from_year"], params["to_year"]), encoding="utf-8")
        log.info("the report is at %s", report)
        return str(directory)

    hands = list_zones()
    parts = [parse.override(task_id=f"parse_{hand}")(hands, hand) for hand in range(HANDS)]
    write_report(aggregate(parts))


# --- the time-zone database ------------------------------------------------------------------------------------------


def region_of(name: str) -> str:
    """Return the part before the first slash; the few names without one are old abbreviations ("CET")."""
    return name.split("/")[0] if "/" in name else "(none)"


def read_zone(name: str) -> bytes:
    """Return the compiled file of a zone."""
    return (resources.files("tzdata") / "zoneinfo").joinpath(*name.split("/")).read_bytes()


def clock_changes(tzif: bytes, last_year: int) -> list[tuple[datetime, int]]:
    """Return when the zone's clocks were or will be moved up to ``last_year``: (UTC instant, by how many seconds).

    A TZif file lists transitions up to some moment; from then on the rule in its footer repeats every year.
    """
    listed, first_offset, footer = parse_tzif(tzif)
    transitions = dict(listed)
    end_of_list = listed[-1][0] if listed else None
    for instant, offset in yearly_transitions(footer, end_of_list.year if end_of_list else FIRST_YEAR, last_year):
        if end_of_list is None or instant > end_of_list:
            transitions[instant] = offset
    changes, before = [], first_offset
    for instant, offset in sorted(transitions.items()):
        if offset != before:
            changes.append((instant, offset - before))
        before = offset
    return changes


def parse_tzif(data: bytes) -> tuple[list[tuple[datetime, int]], int, str]:
    """Return (transitions as (UTC instant, offset from UTC in seconds), the offset before them, the footer).

    A file of version 2 or later holds everything twice: first with 32-bit times, for old readers, then with 64-bit
    ones.
    """
    sizes, start = _read_header(data, 0)
    sizes, start = _read_header(data, start + _block_size(sizes, time_size=4))
    times = struct.unpack_from(f">{sizes['times']}q", data, start)
    start += 8 * sizes["times"]
    kinds = data[start : start + sizes["times"]]
    start += sizes["times"]
    offsets = [struct.unpack_from(">iBB", data, start + 6 * kind)[0] for kind in range(sizes["types"])]
    footer = data.rstrip(b"\n").rpartition(b"\n")[2].decode("ascii")
    transitions = [
        (EPOCH + timedelta(seconds=seconds), offsets[kind])
        for seconds, kind in zip(times, kinds, strict=True)
        if seconds > -(2**40)  # some compilers begin with "the big bang", long before any datetime
    ]
    return transitions, offsets[0], footer


def _read_header(data: bytes, start: int) -> tuple[dict[str, int], int]:
    """Return the sizes of a TZif block and where its body begins."""
    magic, _version, *counts = struct.unpack_from(">4sc15x6I", data, start)
    if magic != b"TZif":
        raise ValueError("not a TZif file")
    return dict(zip(("utc", "standard", "leaps", "times", "types", "chars"), counts, strict=True)), start + 44


def _block_size(sizes: dict[str, int], *, time_size: int) -> int:
    return (
        sizes["times"] * (time_size + 1)
        + sizes["types"] * 6
        + sizes["chars"]
        + sizes["leaps"] * (time_size + 4)
        + sizes["standard"]
        + sizes["utc"]
    )


# A footer like "CET-1CEST,M3.5.0,M10.5.0/3": names and offsets (west is positive!), then when summer begins and ends.
_NAME = r"(?:<[^>]+>|[A-Za-z]+)"
_CLOCK = r"[+-]?\d+(?::\d+){0,2}"
_FOOTER = re.compile(rf"{_NAME}({_CLOCK})(?:{_NAME}({_CLOCK})?,M([\d.]+)(?:/({_CLOCK}))?,M([\d.]+)(?:/({_CLOCK}))?)?")


def yearly_transitions(footer: str, from_year: int, to_year: int) -> list[tuple[datetime, int]]:
    """Return the transitions a footer's rule makes: (UTC instant, offset from UTC in seconds). Without a rule: none."""
    match = _FOOTER.fullmatch(footer)
    if match is None:
        if footer:
            raise ValueError(f"unknown kind of rule: {footer!r}")
        return []
    standard, summer, begin, begin_time, end, end_time = match.groups()
    if begin is None:
        return []
    standard_offset = -_seconds(standard)
    summer_offset = -_seconds(summer) if summer else standard_offset + 3600
    transitions = []
    for year in range(from_year, to_year + 2):  # one more: a rule's local 31 December can be next year's in UTC
        begins = _day(begin, year) + timedelta(seconds=_seconds(begin_time or "2") - standard_offset)
        ends = _day(end, year) + timedelta(seconds=_seconds(end_time or "2") - summer_offset)
        transitions += [(ends, standard_offset), (begins, summer_offset)]
    return transitions


def _seconds(clock: str) -> int:
    """Read "-3:30" or "26" as seconds; hours may lie outside of the day."""
    hours, minutes, seconds = (*clock.lstrip("+-").split(":"), "0", "0")[:3]
    total = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    return -total if clock.startswith("-") else total


def _day(rule: str, year: int) -> datetime:
    """Return midnight of "month.week.weekday": the week-th such weekday (0 = Sunday), 5 being the last of the month."""
    month, week, weekday = map(int, rule.split("."))
    first = datetime(year, month, 1)
    day = first + timedelta(days=(weekday - first.isoweekday()) % 7 + 7 * (week - 1))
    return day if day.month == month else day - timedelta(days=7)


# --- the report ------------------------------------------------------------------------------------------------------


def default_output_dir(run_id: str) -> Path:
    """Return $DFLOW_HOME/reports/tz_report/<run id>."""
    return Path(os.environ.get("DFLOW_HOME", "~/.dflow")) / "reports" / "tz_report" / run_id


def as_markdown(result: dict, from_year: int, to_year: int) -> str:
    """Tell the story: totals by region, and the years with most changes."""
    by_region: Counter[str] = Counter()
    by_year: Counter[int] = Counter()
    for year, region, forward, back in result["rows"]:
        by_region[region] += forward + back
        by_year[year] += forward + back
    lines = [
        f"# Clock changes from {from_year} to {to_year}",
        "",
        f"{sum(result['zones'].values())} time zones changed their clocks {by_region.total()} times.",
        "",
        "| region | zones | changes | per zone |",
        "|---|---:|---:|---:|",
    ]
    for region, zones in sorted(result["zones"].items(), key=lambda item: -by_region[item[0]]):
        lines.append(f"| {region} | {zones} | {by_region[region]} | {by_region[region] / zones:.1f} |")
    lines += ["", "## The busiest years", "", "| year | changes |", "|---|---:|"]
    lines += [f"| {year} | {changes} |" for year, changes in sorted(by_year.items(), key=lambda i: (-i[1], i[0]))[:10]]
    return "\n".join(lines) + "\n"


tz_report()

"""``schedule=`` of a DAG, as people write it, reduced to a `ScheduleSpec`.

None, a preset (``@daily``), a five-field cron expression, a timedelta, or one of the two timetables below. As in
Airflow 3 a cron string is a trigger timetable: the run starts at the tick and its data interval is that instant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta, tzinfo
from typing import Any, Final

from dflow.authoring import checks
from dflow.authoring.refusal import did_you_mean, not_supported, refusal
from dflow.core import timetable
from dflow.core.errors import DagDefinitionError
from dflow.core.spec import ScheduleSpec

_WITHOUT_CRON: Final = {"@once": "once", "@continuous": "continuous"}


class CronTriggerTimetable:
    """Runs at the ticks of a cron expression in a time zone: ``CronTriggerTimetable("0 3 * * *", timezone="UTC")``."""

    def __init__(self, cron: str, *, timezone: str | tzinfo, **later: Any) -> None:
        _refuse_later("CronTriggerTimetable", later, ("interval", "run_immediately"))
        self.zone = checks.zone_name(timezone, "the timezone of CronTriggerTimetable")
        self.cron = cron
        self.spec = _cron(cron, self.zone)


class DeltaTriggerTimetable:
    """Runs each time a length of time has passed: ``DeltaTriggerTimetable(timedelta(hours=4))``."""

    def __init__(self, delta: timedelta, **later: Any) -> None:
        _refuse_later("DeltaTriggerTimetable", later, ("interval",))
        self.delta = delta
        self.spec = _delta(delta, "UTC")


def schedule_spec(schedule: Any, zone: str) -> ScheduleSpec:
    """Return the spec of ``schedule`` in the DAG's time zone; raises `DagDefinitionError` saying what to write."""
    if schedule is None:
        return ScheduleSpec(timezone=zone)
    if isinstance(schedule, CronTriggerTimetable):
        return schedule.spec
    if isinstance(schedule, DeltaTriggerTimetable):
        return _delta(schedule.delta, zone)
    if isinstance(schedule, timedelta):
        return _delta(schedule, zone)
    if isinstance(schedule, str):
        return _cron(schedule, zone)
    if isinstance(schedule, Iterable | Mapping):
        raise not_supported("a schedule of assets")
    raise not_supported(
        f"a schedule of type {type(schedule).__name__}", "use None, a preset, a cron expression or a timedelta"
    )


def _cron(expression: Any, zone: str) -> ScheduleSpec:
    if not isinstance(expression, str):
        raise refusal(f"a cron expression must be a string, not {type(expression).__name__}")
    text = expression.strip()
    if text == "None":
        raise refusal("schedule 'None' is a string; write schedule=None")
    if text in _WITHOUT_CRON:
        return ScheduleSpec(kind=_WITHOUT_CRON[text], timezone=zone, summary=text)
    if text.startswith("@") and text not in timetable.PRESETS:
        near, presets = did_you_mean(text, timetable.PRESETS), ", ".join(timetable.PRESETS)
        raise refusal(f"schedule {text!r} does not exist{near}; use a cron expression or one of {presets}")
    try:
        normalised = timetable.validate_cron(text)
    except DagDefinitionError as error:  # core does not know the user's line
        raise refusal(error.message) from None
    return ScheduleSpec(kind="cron", expression=normalised, timezone=zone, summary=text)


def _delta(delta: Any, zone: str) -> ScheduleSpec:
    if not isinstance(delta, timedelta):
        raise refusal(f"the interval of a schedule must be a timedelta, not {type(delta).__name__}")
    if delta <= timedelta():
        raise refusal(f"the interval of a schedule must be more than zero, got {delta}")
    return ScheduleSpec(kind="delta", interval_seconds=delta.total_seconds(), timezone=zone, summary=str(delta))


def _refuse_later(owner: str, given: Mapping[str, Any], planned: Iterable[str]) -> None:
    for name, value in given.items():
        if name not in planned:
            raise refusal(f"{owner} takes no argument {name!r}{did_you_mean(name, planned)}")
        if value:
            raise not_supported(f"{name}= of {owner}")

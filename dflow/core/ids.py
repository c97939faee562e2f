"""Names dflow makes up for people: run ids. The form is Airflow's: ``<run type>__<run_after in ISO 8601>``."""

from __future__ import annotations

from datetime import UTC, datetime

from dflow.core.states import RunType


def run_id_for(run_type: RunType | str, run_after: datetime) -> str:
    """Return the id of a run that nobody named, e.g. ``manual__2026-11-22T10:00:00.123456+00:00``.

    ``run_after`` must be aware; the id shows it in UTC, so one instant has one name. Raises ValueError for a naive
    datetime and for an unknown run type.
    """
    if run_after.tzinfo is None:
        raise ValueError(f"run_after {run_after.isoformat()} has no time zone; pass an aware datetime")
    return f"{RunType(run_type).value}__{run_after.astimezone(UTC).isoformat()}"

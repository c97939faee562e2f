"""A schedule in a time zone: at 06:30 in Berlin on working days, summer and winter.

The time zone of `start_date` is the schedule's. Clocks that move do not move the run: it stays at 06:30 local time,
which is 05:30 UTC in winter and 04:30 UTC in summer.

`catchup=False`: after a break only the latest missed run is made up for. With `catchup=True` every missed one is, in
order. At most one run at a time (`max_active_runs=1`), and a run that takes longer than two hours is ended.

This one is paused when it first appears; `dflow dags unpause example_schedule_time_zone` lets it go.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from dflow import DAG, task

with DAG(
    "example_schedule_time_zone",
    schedule="30 6 * * 1-5",
    start_date=datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=2),
    is_paused_upon_creation=True,
    tags=["example"],
    doc_md=__doc__,
):

    @task
    def good_morning(logical_date=None, data_interval_end=None) -> None:
        """A run that was triggered by hand without a date has no logical date."""
        print(f"This run is for {logical_date or 'no date'}.")

    good_morning()

"""The two shapes that are measured, a fan-out 1 -> 500 -> 1 and a chain of 50, of tasks that do next to nothing."""

from __future__ import annotations

import time

from dflow import DAG, chain, task

WIDTH, LENGTH = 500, 50

with DAG("bench_fanout", max_active_tasks=1000, is_paused_upon_creation=False):

    @task
    def noop() -> None:
        """Do nothing."""

    first, last = noop.override(task_id="first")(), noop.override(task_id="last")()
    for number in range(WIDTH):
        first >> noop.override(task_id=f"noop_{number:03}")() >> last

with DAG("bench_chain", is_paused_upon_creation=False):

    @task
    def link() -> dict:
        """Tell when the function began and ended."""
        began = time.time()
        return {"began": began, "ended": time.time()}

    chain(*(link.override(task_id=f"link_{number:02}")() for number in range(LENGTH)))

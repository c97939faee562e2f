"""Pools and priorities: how many at once, and who first.

A pool is a number of slots that tasks of *all* DAGs share, for what many at once would overload: a database, an API.
A task takes `pool_slots` of it while it is queued or running; the others wait as `scheduled`. Make a smaller one and
watch:

    dflow pools set narrow 2 'two at a time'

and put its name below in place of `default_pool`, which every task is in that names none.

Among tasks that wait, the higher `priority_weight` goes first. By default a task's weight counts everything that waits
for it (`weight_rule="downstream"`); with "absolute" it is just the number.
"""

from __future__ import annotations

import time

from dflow import dag, task

POOL = "default_pool"


@dag(
    dag_id="example_pools_and_priorities",
    schedule=None,
    max_active_tasks=4,
    is_paused_upon_creation=False,
    tags=["example"],
    doc_md=__doc__,
)
def pools_and_priorities():
    @task(pool=POOL, weight_rule="absolute")
    def query(number: int) -> int:
        time.sleep(0.1)
        return number

    @task(pool=POOL, pool_slots=2, priority_weight=100, weight_rule="absolute")
    def big_query() -> int:
        time.sleep(0.1)
        return 100

    @task
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    numbers = [query.override(task_id=f"query_{n}", priority_weight=n)(n) for n in range(8)]
    total([*numbers, big_query()])


pools_and_priorities()

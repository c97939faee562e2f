"""Task groups: a name for some tasks that belong together.

A group is a prefix for the ids of its tasks ("extract.orders") and something that can be put in order as a whole: what
comes before the group comes before its first tasks, what comes after waits for its last ones. Groups nest. They have no
state of their own, and cost nothing.
"""

from __future__ import annotations

from dflow import dag, task, task_group


@dag(dag_id="example_task_groups", schedule=None, is_paused_upon_creation=False, tags=["example"], doc_md=__doc__)
def task_groups():
    @task
    def rows(table: str) -> int:
        return len(table)

    @task
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @task_group
    def extract() -> list:
        @task_group
        def crm() -> list:
            return [rows.override(task_id=table)(table) for table in ("customers", "contacts")]

        return [rows.override(task_id="orders")("orders"), *crm()]

    @task
    def report(count: int) -> None:
        print(f"{count} rows")

    report(total(extract()))


task_groups()

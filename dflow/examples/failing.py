"""A failure and its cause: every end says why.

This run fails. `divide` raises; its one retry fails as well; `tell` never runs. Look at how that is told:

    dflow dags trigger example_failing --wait             ends with exit code 1
    dflow runs show example_failing latest                state and cause of each task
    dflow tasks logs example_failing latest divide        the traceback, and the exception behind the exception

The cause is one line, "ReportError: cannot average 10 over 0 rows" here. A process that was killed, ran out of memory
or took too long has one too: the signal, the peak memory, the limit.
"""

from __future__ import annotations

from datetime import timedelta

from dflow import dag, task


class ReportError(Exception):
    """What this DAG's users would understand."""


@dag(dag_id="example_failing", schedule=None, is_paused_upon_creation=False, tags=["example"], doc_md=__doc__)
def failing():
    @task(retries=1, retry_delay=timedelta(seconds=1))
    def divide(total: int, count: int) -> float:
        try:
            return total / count
        except ZeroDivisionError as error:
            raise ReportError(f"cannot average {total} over {count} rows") from error

    @task
    def tell(average: float) -> None:
        print(f"never printed: {average}")

    tell(divide(10, 0))


failing()

"""Retries with backoff: a task that fails twice and succeeds at the third try.

`retries=3` allows three more tries after the first. The wait grows with each: `retry_exponential_backoff=2` doubles it,
`max_retry_delay` caps it. While it waits, the task is `up_for_retry` and occupies no worker. Each try has its own log:

    dflow tasks logs example_retries latest flaky --try 1

These are retries for what the *task* does wrong. When a *worker* is lost, the attempt runs again without using one up
(the setting `core.infra_retries`).
"""

from __future__ import annotations

from datetime import timedelta

from dflow import dag, task


@dag(dag_id="example_retries", schedule=None, is_paused_upon_creation=False, tags=["example"], doc_md=__doc__)
def retries():
    @task(
        retries=3,
        retry_delay=timedelta(seconds=1),
        retry_exponential_backoff=2,
        max_retry_delay=timedelta(seconds=5),
    )
    def flaky(ti=None) -> str:
        if ti.try_number < 3:
            raise ConnectionError(f"try {ti.try_number}: the service is not there yet")
        return f"it took {ti.try_number} tries"

    @task
    def tell(how: str) -> None:
        print(how)

    tell(flaky())


retries()

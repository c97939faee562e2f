"""The yardstick: a plain Celery application with one task that does nothing, as a Celery user would write it."""

from __future__ import annotations

import os

from celery import Celery

app = Celery("raw", broker=os.environ.get("RAW_BROKER_URL"), set_as_current=False)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="raw",
    broker_connection_retry_on_startup=True,
)


@app.task(name="raw.noop")
def noop() -> None:
    """Do nothing."""

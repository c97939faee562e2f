"""A ledger that tasks write themselves: who ran when, on a connection of their own; dflow need not be believed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text

from tests.support import Cluster

DAG_ID, TASKS = "mixed", 50

# 1 task, fanned out to 30, joined, then a chain: 50 task instances. Each notes its beginning and its end.
SOURCE = """
import os, time
import psycopg2
from dflow import DAG, chain, get_current_context, task


@task
def note(seconds: float = SECONDS) -> None:
    ti = get_current_context()["ti"]
    connection = psycopg2.connect(os.environ["LEDGER_URL"])
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO ledger (run_id, task_id, attempt_id, pid) VALUES (%s, %s, %s, %s) RETURNING id",
            (ti.run_id, ti.task_id, str(ti.attempt_id), os.getpid()),
        )
        (row,) = cursor.fetchone()
        time.sleep(seconds)
        cursor.execute("UPDATE ledger SET ended_at = clock_timestamp() WHERE id = %s", (row,))
    connection.close()


with DAG("mixed", max_active_runs=100, max_active_tasks=100, is_paused_upon_creation=False):
    first, join = note.override(task_id="first")(), note.override(task_id="join")()
    for number in range(30):
        first >> note.override(task_id=f"wide_{number:02}")() >> join
    chain(join, *(note.override(task_id=f"link_{number:02}")() for number in range(18)))
"""


def install(cluster: Cluster, *, seconds: float = 0.01) -> dict[str, str]:
    """Make the table and the DAG file; returns the environment workers need."""
    with cluster.store.begin() as tx:
        tx.execute(
            text(
                "CREATE TABLE ledger (id bigserial PRIMARY KEY, run_id text, task_id text, attempt_id uuid,"
                " pid integer, began_at timestamptz DEFAULT clock_timestamp(), ended_at timestamptz)"
            )
        )
    cluster.add_dag("mixed.py", SOURCE.replace("SECONDS", repr(seconds)))
    return {"LEDGER_URL": cluster.settings.database.sql_alchemy_conn.replace("+psycopg2", "")}


def entries(cluster: Cluster) -> int:
    """How many notes there are so far."""
    return cluster.count("SELECT count(*) FROM ledger")


def ran_exactly_once(cluster: Cluster, runs: int) -> None:
    """Assert one complete note for every task instance, and not one more."""
    assert cluster.rows("SELECT run_id, task_id, count(*) FROM ledger GROUP BY 1, 2 HAVING count(*) <> 1") == []
    assert cluster.count("SELECT count(*) FROM ledger WHERE ended_at IS NOT NULL") == runs * TASKS


def never_beside_itself(cluster: Cluster, runs: int) -> None:
    """Assert that every task instance ended its work at least once, and never ran twice at the same time.

    A note without an end is an attempt that was killed; its end is when dflow wrote the attempt off.
    """
    done: Any = "SELECT count(DISTINCT (run_id, task_id)) FROM ledger WHERE ended_at IS NOT NULL"
    assert cluster.count(done) == runs * TASKS
    overlaps = """
        WITH span AS (SELECT l.run_id, l.task_id, l.attempt_id, l.began_at, coalesce(l.ended_at, a.ended_at) AS ended_at
                      FROM ledger l JOIN attempt a ON a.id = l.attempt_id)
        SELECT * FROM span one JOIN span other USING (run_id, task_id)
        WHERE one.attempt_id <> other.attempt_id AND one.began_at <= other.began_at AND other.began_at < one.ended_at"""
    assert cluster.rows(overlaps) == []
    twice = "SELECT attempt_id, count(*) FROM ledger GROUP BY 1 HAVING count(*) > 1"
    assert cluster.rows(twice) == []


def no_user_retry_spent(cluster: Cluster) -> None:
    """Assert that whatever happened was charged to the infrastructure."""
    assert cluster.rows("SELECT task_id, user_failures FROM task_instance WHERE user_failures > 0") == []

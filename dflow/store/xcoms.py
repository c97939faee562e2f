"""XCom: the JSON values tasks hand to each other, by run, task, map index and key.

A running attempt writes under its fence; the claim of a further attempt forgets what earlier ones wrote (`apply`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from dflow.core.errors import StaleAttemptError
from dflow.store.prepared import Prepared
from dflow.store.rows import json_document


@dataclass(frozen=True, slots=True, kw_only=True)
class NewXCom:
    """A value an attempt hands over; ``value`` is anything JSON can hold."""

    ti_id: int
    attempt_id: str
    key: str
    value: Any


class XCom(NamedTuple):
    """A stored value and whose it is."""

    task_id: str
    map_index: int
    value: Any


def put(tx: Connection, *, ti_id: int, attempt_id: str, key: str, value: Any) -> None:
    """Store one value of a running attempt. Raises StaleAttemptError when it is no longer that attempt's turn."""
    if not put_many(tx, [NewXCom(ti_id=ti_id, attempt_id=attempt_id, key=key, value=value)]):
        raise StaleAttemptError(f"The attempt {attempt_id} no longer runs; its result {key!r} was not stored.")


def put_many(tx: Connection, xcoms: Sequence[NewXCom]) -> set[str]:
    """Store values of running attempts and return the attempt ids whose turn it still is; others' values are dropped.

    Of two values for one key the later counts. Locks the task instances in the order of their ids, so that what is
    stored belongs to the attempt that is finished in the same transaction. One statement.
    """
    if not xcoms:
        return set()
    last = {(one.ti_id, one.attempt_id, one.key): one for one in xcoms}.values()
    rows = _PUT.execute(
        tx,
        {
            "ti_ids": [one.ti_id for one in last],
            "attempt_ids": [one.attempt_id for one in last],
            "keys": [one.key for one in last],
            "values": [json_document(one.value, f"The value of XCom {one.key!r}") for one in last],
        },
    )
    return set(rows.scalars())


def get(tx: Connection, run_pk: int, task_id: str, key: str = "return_value", map_index: int = -1) -> XCom | None:
    """Return one value, or None when there is none (which a stored None is not). One index probe."""
    row = tx.execute(_GET, {"run_pk": run_pk, "task_id": task_id, "map_index": map_index, "key": key}).first()
    return None if row is None else XCom(task_id, map_index, row.value)


def pull(
    tx: Connection,
    run_pk: int,
    *,
    key: str = "return_value",
    task_ids: Iterable[str] | None = None,
    map_indexes: Iterable[int] | None = None,
    dag_id: str | None = None,
    run_id: str | None = None,
    include_prior_dates: bool = False,
) -> list[XCom]:
    """Return the values of a key, by task id and map index; None for ``task_ids`` or ``map_indexes`` means all.

    They come from the run ``run_pk``, or from the run ``run_id`` of ``dag_id`` where given (``run_id`` alone: of the
    same DAG; ``dag_id`` alone: its run of the same logical date). ``include_prior_dates`` takes, for each task, the
    latest value of that run or an earlier one of its DAG (Airflow's `xcom_pull`), at the cost of looking at all those.
    """
    source = _source_run(tx, run_pk, dag_id, run_id)
    if source is None:
        return []
    parameters = {
        "run_pk": source,
        "key": key,
        "task_ids": None if task_ids is None else list(task_ids),
        "map_indexes": None if map_indexes is None else list(map_indexes),
    }
    query = _PULL_WITH_PRIOR if include_prior_dates else _PULL
    return [XCom(*row) for row in tx.execute(query, parameters)]


def _source_run(tx: Connection, run_pk: int, dag_id: str | None, run_id: str | None) -> int | None:
    if dag_id is None and run_id is None:
        return run_pk
    query = _SOURCE_OF_SAME_DATE if run_id is None else _SOURCE_RUN
    found: int | None = tx.execute(query, {"run_pk": run_pk, "dag_id": dag_id, "run_id": run_id}).scalar_one_or_none()
    return found


def keys(tx: Connection, run_pk: int, task_id: str, map_index: int = -1) -> list[str]:
    """Return the keys a task has values for."""
    return list(tx.execute(_KEYS, {"run_pk": run_pk, "task_id": task_id, "map_index": map_index}).scalars())


_PUT = Prepared(
    """
    WITH fenced AS MATERIALIZED (
        SELECT ti.id, ti.attempt_id, ti.run_pk, ti.task_id, ti.map_index FROM task_instance ti
        WHERE ti.state = 'running' AND (ti.id, ti.attempt_id) IN (
            SELECT * FROM unnest(:ti_ids, :attempt_ids))
        ORDER BY ti.id FOR NO KEY UPDATE
    ), stored AS (
        INSERT INTO xcom (run_pk, task_id, map_index, key, value)
        SELECT f.run_pk, f.task_id, f.map_index, n.key, n.value
        FROM unnest(:ti_ids, :attempt_ids, :keys, :values) AS n(ti_id, attempt_id, key, value)
        JOIN fenced f ON f.id = n.ti_id AND f.attempt_id = n.attempt_id
        ON CONFLICT (run_pk, task_id, map_index, key) DO UPDATE SET value = excluded.value, created_at = now()
    )
    SELECT CAST(attempt_id AS text) FROM fenced""",
    {"ti_ids": "bigint[]", "attempt_ids": "uuid[]", "keys": "text[]", "values": "jsonb[]"},
)

_GET = text("""
    SELECT value FROM xcom WHERE run_pk = :run_pk AND task_id = :task_id AND map_index = :map_index AND key = :key""")

_PULL = text("""
    SELECT task_id, map_index, value FROM xcom
    WHERE run_pk = :run_pk AND key = :key
      AND (CAST(:task_ids AS text[]) IS NULL OR task_id = ANY(CAST(:task_ids AS text[])))
      AND (CAST(:map_indexes AS integer[]) IS NULL OR map_index = ANY(CAST(:map_indexes AS integer[])))
    ORDER BY task_id, map_index""")

_PULL_WITH_PRIOR = text("""
    SELECT DISTINCT ON (x.task_id, x.map_index) x.task_id, x.map_index, x.value
    FROM dag_run s
    JOIN dag_run r ON r.dag_id = s.dag_id
        AND coalesce(r.logical_date, r.run_after) <= coalesce(s.logical_date, s.run_after)
    JOIN xcom x ON x.run_pk = r.id AND x.key = :key
        AND (CAST(:task_ids AS text[]) IS NULL OR x.task_id = ANY(CAST(:task_ids AS text[])))
        AND (CAST(:map_indexes AS integer[]) IS NULL OR x.map_index = ANY(CAST(:map_indexes AS integer[])))
    WHERE s.id = :run_pk
    ORDER BY x.task_id, x.map_index, coalesce(r.logical_date, r.run_after) DESC, r.id DESC""")

_SOURCE_RUN = text("""
    SELECT other.id FROM dag_run own JOIN dag_run other
        ON other.dag_id = coalesce(CAST(:dag_id AS text), own.dag_id) AND other.run_id = :run_id
    WHERE own.id = :run_pk""")

_SOURCE_OF_SAME_DATE = text("""
    SELECT other.id FROM dag_run own JOIN dag_run other
        ON other.dag_id = :dag_id AND (other.id = own.id OR other.logical_date = own.logical_date)
    WHERE own.id = :run_pk ORDER BY other.id = own.id DESC LIMIT 1""")

_KEYS = text("""
    SELECT key FROM xcom WHERE run_pk = :run_pk AND task_id = :task_id AND map_index = :map_index ORDER BY key""")

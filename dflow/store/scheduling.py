"""Queries that only the scheduler's services ask: taking ends, which DAGs have room for due runs, which runs are stuck.

Locks follow the one order dag -> run -> task instance, by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, text

from dflow.core.states import TaskState
from dflow.store.dags import Dag
from dflow.store.prepared import Prepared
from dflow.store.rows import columns
from dflow.store.runs import Affinity


class End(NamedTuple):
    """A task instance whose stored state the planner has not heard of."""

    ti_id: int
    state: TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class RunToPlan:
    """A locked run and what is in its inbox. ``version`` is the row's, already counted up for this transaction."""

    id: int
    state: str
    dag_version_id: int
    version: int
    ends: list[End]


def take_ends(tx: Connection, limit: int, affinity: Affinity | None = None) -> list[RunToPlan]:
    """Lock runs with unaccounted ends, empty their inboxes and count their versions up: `lock_for_planning`,
    `take_inbox` and `bump_version` of `dflow.store.runs` in one round trip.

    A run another scheduler holds is passed over (SKIP LOCKED) and its ends stay where they are. An end committed after
    this statement began is taken by a later one. Costs one scan of the inbox.
    """
    share = affinity or Affinity()
    rows = _TAKE_ENDS.execute(
        tx, {"limit": limit, "index": share.index, "count": share.count, "grace_seconds": share.grace_seconds}
    )
    return [
        RunToPlan(
            id=row.id,
            state=row.state,
            dag_version_id=row.dag_version_id,
            version=row.version,
            ends=[
                End(ti_id, TaskState(state)) for ti_id, state in zip(row.ti_ids or (), row.states or (), strict=True)
            ],
        )
        for row in rows
    ]


def has_scheduled(tx: Connection) -> bool:
    """Return whether any task instance waits for admission. One probe of a partial index."""
    return bool(_HAS_SCHEDULED.execute(tx, {}).scalar_one())


def lock_due_dags(tx: Connection, limit: int, *, leave_out: Sequence[str] = ()) -> list[tuple[Dag, int]]:
    """Lock (SKIP LOCKED) active, unpaused DAGs with a due run and room for it; return each with its room.

    Room is ``max_active_runs`` less the runs that are queued or running, as in Airflow: a DAG that is behind gets its
    next run when one has ended. Costs a scan of the index `dag_due` up to now and two index probes for each.
    """
    rows = tx.execute(_LOCK_DUE_DAGS, {"limit": limit, "leave_out": list(leave_out)}).mappings().all()
    found = []
    for row in rows:
        fields = dict(row)
        room = fields.pop("room")
        found.append((Dag(**fields), room))
    return found


def poke_stuck_runs(tx: Connection, *, idle_seconds: float, limit: int) -> list[int]:
    """Put running runs in which nothing is under way and nothing waits to be accounted back into the inbox.

    There should be none: this is the net under the planner. Their versions are counted up, so that whoever plans them
    reads their states anew. Returns the runs. Locks them (SKIP LOCKED); costs a few index probes for each running run.
    """
    return list(tx.execute(_POKE_STUCK_RUNS, {"idle_seconds": idle_seconds, "limit": limit}).scalars())


_TAKE_ENDS = Prepared(
    """
    WITH wanted AS MATERIALIZED (
        SELECT u.run_pk FROM unaccounted u GROUP BY u.run_pk
        HAVING mod(u.run_pk, :count) = :index OR min(u.at) < clock_timestamp() - make_interval(secs => :grace_seconds)
    ), locked AS MATERIALIZED (
        SELECT r.id FROM dag_run r WHERE r.id IN (SELECT run_pk FROM wanted)
        ORDER BY r.id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED
    ), taken AS (
        DELETE FROM unaccounted u USING locked WHERE u.run_pk = locked.id RETURNING u.run_pk, u.ti_id, u.state, u.at
    ), bumped AS (
        UPDATE dag_run r SET version = r.version + 1 FROM locked WHERE r.id = locked.id
        RETURNING r.id, r.state, r.dag_version_id, r.version
    )
    SELECT b.id, b.state, b.dag_version_id, b.version,
           array_agg(t.ti_id ORDER BY t.at, t.ti_id) FILTER (WHERE t.ti_id IS NOT NULL) AS ti_ids,
           array_agg(t.state ORDER BY t.at, t.ti_id) FILTER (WHERE t.ti_id IS NOT NULL) AS states
    FROM bumped b LEFT JOIN taken t ON t.run_pk = b.id
    GROUP BY b.id, b.state, b.dag_version_id, b.version ORDER BY b.id""",
    {"limit": "bigint", "index": "bigint", "count": "bigint", "grace_seconds": "double precision"},
)

_HAS_SCHEDULED = Prepared("SELECT EXISTS (SELECT 1 FROM task_instance WHERE state = 'scheduled')", {})

_DAG_COLUMNS = columns(" ".join(Dag.__dataclass_fields__), "d")

_LOCK_DUE_DAGS = text(f"""
    SELECT {_DAG_COLUMNS}, d.max_active_runs - open.runs AS room
    FROM dag d CROSS JOIN LATERAL (
        SELECT (SELECT count(*) FROM dag_run q WHERE q.dag_id = d.dag_id AND q.state = 'queued')
             + (SELECT count(*) FROM dag_run x WHERE x.dag_id = d.dag_id AND x.state = 'running') AS runs) AS open
    WHERE d.is_active AND NOT d.is_paused AND d.next_run_after IS NOT NULL AND d.next_run_after <= now()
      AND open.runs < d.max_active_runs AND d.dag_id <> ALL(CAST(:leave_out AS text[]))
    ORDER BY d.next_run_after LIMIT :limit FOR NO KEY UPDATE OF d SKIP LOCKED""")

_POKE_STUCK_RUNS = text("""
    WITH stuck AS MATERIALIZED (
        SELECT r.id FROM dag_run r
        WHERE r.state = 'running' AND r.started_at < now() - make_interval(secs => :idle_seconds)
          AND NOT EXISTS (SELECT 1 FROM task_instance t
                          WHERE t.run_pk = r.id AND t.state IN ('queued', 'running'))
          AND NOT EXISTS (SELECT 1 FROM task_instance t WHERE t.run_pk = r.id AND t.state = 'scheduled')
          AND NOT EXISTS (SELECT 1 FROM unaccounted u WHERE u.run_pk = r.id)
          AND NOT EXISTS (SELECT 1 FROM task_instance t WHERE t.run_pk = r.id
                          AND (t.state IN ('up_for_retry', 'up_for_reschedule', 'deferred', 'restarting')
                               OR t.ended_at > now() - make_interval(secs => :idle_seconds)))
        ORDER BY r.id LIMIT :limit FOR NO KEY UPDATE OF r SKIP LOCKED
    ), poked AS (
        INSERT INTO unaccounted (ti_id, run_pk, state)
        SELECT t.id, stuck.id, t.state FROM stuck CROSS JOIN LATERAL (
            SELECT id, state FROM task_instance WHERE run_pk = stuck.id ORDER BY task_id LIMIT 1) t
    )
    UPDATE dag_run r SET version = r.version + 1 FROM stuck WHERE r.id = stuck.id RETURNING r.id""")

"""Admission: which scheduled task instances may take a slot now (`scheduled -> queued`).

Every limit is counted from rows inside the statement that takes the slot, and admitting transactions go one after the
other (an advisory lock held until commit), so the counts are exact with any number of schedulers. What cannot run is
left out *before* rows are ranked and cut, so a full pool, a queue without workers or a run at its limit never fills the
window of the others. No counter is stored anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from sqlalchemy import Connection

from dflow.core.messages import Nudge
from dflow.store.apply import Effects, statement

ADMISSION_LOCK = 0x64666C6F77  # "dflow": the advisory lock key all admitting transactions share


def admit(tx: Connection, *, executor: str, limit: int, lookahead: Mapping[str, int], actor: str) -> list[Nudge]:
    """Admit the best scheduled task instances that fit all limits and give each its attempt id.

    In order of priority, then age of the run: at most ``limit``; per run ``max_active_tasks``; per pool its free slots;
    per queue what the live workers listening to it have free, plus ``lookahead[queue]`` messages that they will take in
    a moment. Tasks of paused DAGs and tasks bound to another executor stay where they are.

    Serialized by an advisory lock until the end of the transaction; locks the admitted task instances, passing over
    those another transaction holds. Costs one scan of the active task instances, and for each running run an index
    probe of at most as many rows as its limit leaves free.
    """
    rows = _ADMIT.execute(
        tx,
        {"executor": executor, "limit": limit, "lookahead": json.dumps(dict(lookahead)), "actor": actor},
        after=_LOCK,
    )
    return [
        Nudge(
            ti_id=row.id,
            attempt_id=row.attempt_id,
            dag_id=row.dag_id,
            task_id=row.task_id,
            run_id=row.run_id,
            map_index=row.map_index,
            queue=row.queue,
            priority_weight=row.priority_weight,
        )
        for row in rows
    ]


_LOCK = f"SELECT pg_advisory_xact_lock({ADMISSION_LOCK})"

# A worker that listens to "*" (the processes of a local executor) takes from one lane of that name; otherwise every
# queue is a lane of its own.
_SOURCE = """
WITH lane_slots AS MATERIALIZED (
    SELECT queue AS lane, sum(concurrency) AS slots
    FROM worker, unnest(queues) AS queue
    WHERE state = 'live' AND lease_until > now() AND executor = :executor
    GROUP BY queue
), has_star AS MATERIALIZED (
    SELECT EXISTS (SELECT 1 FROM lane_slots WHERE lane = '*') AS star
), active AS MATERIALIZED (
    SELECT run_pk, pool, pool_slots, CASE WHEN star THEN '*' ELSE queue END AS lane
    FROM task_instance, has_star WHERE state IN ('queued', 'running')
), lane_free AS MATERIALIZED (
    SELECT l.lane, l.slots + coalesce((:lookahead ->> l.lane)::bigint, 0) - coalesce(u.used, 0) AS free
    FROM lane_slots l LEFT JOIN (SELECT lane, count(*) AS used FROM active GROUP BY lane) u ON u.lane = l.lane
), pool_free AS MATERIALIZED (
    SELECT p.name, CASE WHEN p.slots < 0 THEN 2147483647 ELSE p.slots - coalesce(u.used, 0) END AS free
    FROM pool p LEFT JOIN (SELECT pool, sum(pool_slots) AS used FROM active GROUP BY pool) u ON u.pool = p.name
), run_free AS MATERIALIZED (
    SELECT r.id, r.run_after, r.max_active_tasks - coalesce(u.used, 0) AS free
    FROM dag_run r JOIN dag d ON d.dag_id = r.dag_id AND NOT d.is_paused
    LEFT JOIN (SELECT run_pk, count(*) AS used FROM active GROUP BY run_pk) u ON u.run_pk = r.id
    WHERE r.state = 'running' AND r.cancel_requested_at IS NULL
), candidate AS MATERIALIZED (
    SELECT ti.*, r.run_after
    FROM run_free r CROSS JOIN LATERAL (
        SELECT t.id, t.pool, t.pool_slots, t.priority_weight, pf.free AS pool_free, lf.lane, lf.free AS lane_free
        FROM task_instance t
        CROSS JOIN has_star
        JOIN pool_free pf ON pf.name = t.pool AND pf.free >= t.pool_slots
        JOIN lane_free lf ON lf.lane = CASE WHEN star THEN '*' ELSE t.queue END AND lf.free > 0
        WHERE t.run_pk = r.id AND t.state = 'scheduled' AND (t.executor IS NULL OR t.executor = :executor)
        ORDER BY t.priority_weight DESC, t.id
        LIMIT least(r.free, :limit)
    ) ti
    WHERE r.free > 0
), pool_ranked AS (
    SELECT *, sum(pool_slots) OVER (PARTITION BY pool ORDER BY priority_weight DESC, run_after, id) AS pool_taken
    FROM candidate
), lane_ranked AS (
    SELECT *, row_number() OVER (PARTITION BY lane ORDER BY priority_weight DESC, run_after, id) AS lane_rank
    FROM pool_ranked WHERE pool_taken <= pool_free
), chosen AS (
    SELECT id FROM lane_ranked WHERE lane_rank <= lane_free ORDER BY priority_weight DESC, run_after, id LIMIT :limit
)
SELECT id AS ti_id, 'scheduled' AS from_state, 'queued' AS to_state, 'admitted' AS reason,
    CAST(NULL AS uuid) AS attempt_id, :actor AS actor, CAST(NULL AS text) AS cause,
    CAST(NULL AS uuid) AS worker_id, CAST(NULL AS text) AS hostname, CAST(NULL AS integer) AS pid,
    CAST(NULL AS timestamptz) AS not_before,
    CAST(NULL AS double precision) AS delay_seconds, false AS user_failure, false AS infra_failure,
    CAST(NULL AS integer) AS exit_code, CAST(NULL AS bigint) AS peak_rss_bytes, false AS account
FROM chosen
"""

_ADMIT = statement(
    _SOURCE,
    {"executor": "text", "limit": "bigint", "lookahead": "jsonb", "actor": "text"},
    Effects(),
    skip_locked=True,
    extra="(SELECT r.run_id FROM dag_run r WHERE r.id = moved.run_pk) AS run_id",
)

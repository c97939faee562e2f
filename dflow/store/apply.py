"""The only writer of a task instance's state.

Every change of state in dflow is one row of a *source* (a list of `Change`s, or the ranking query of admission) that
goes through one statement. That statement

- moves only rows that still have the expected prior state **and** the expected attempt id (the fence), so a writer
  that is late, repeated or superseded changes nothing, and sees it by its absence from the result;
- writes the event row, the history row of an attempt that ends, and the scheduler's inbox row of an end, all in the
  same transaction as the change itself;
- locks rows in the order of their ids, as everything that locks task instances does.

Legal transitions are checked once more by a trigger in the database.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Row

from dflow.core.states import TERMINAL, Reason, TaskState
from dflow.store.prepared import Prepared
from dflow.store.rows import storable


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One wanted transition of one task instance.

    ``from_state`` and ``attempt_id`` are the fence: both must equal the row's (``attempt_id`` None: the row has none).
    ``not_before`` and ``delay_seconds`` (from now, by the database's clock) say when a waiting state ends; give one.
    ``user_failure`` and ``infra_failure`` spend one of the respective budget. ``account`` puts an end into the
    scheduler's inbox; only the planner, which already knows, leaves it out.
    """

    ti_id: int
    from_state: TaskState
    to_state: TaskState
    reason: Reason
    attempt_id: str | None
    actor: str
    cause: str | None = None
    worker_id: str | None = None
    hostname: str | None = None
    pid: int | None = None
    not_before: datetime | None = None
    delay_seconds: float | None = None
    user_failure: bool = False
    infra_failure: bool = False
    exit_code: int | None = None
    peak_rss_bytes: int | None = None
    account: bool = True


@dataclass(frozen=True, slots=True)
class Applied:
    """A change that happened. ``attempt_id`` is the row's after the change (a new one on admission)."""

    ti_id: int
    run_pk: int
    dag_id: str
    task_id: str
    map_index: int
    attempt_id: str | None
    to_state: TaskState
    queue: str
    priority_weight: int


@dataclass(frozen=True, slots=True)
class Effects:
    """Which side rows a batch of changes needs; a statement is built once for each combination and kept."""

    starts: bool = False  # an attempt starts: results of earlier attempts are forgotten
    ends_attempt: bool = False  # an attempt ends: its history row is written
    accounts: bool = False  # an end goes to the scheduler's inbox


def apply(tx: Connection, changes: Sequence[Change]) -> list[Applied]:
    """Make the changes that still apply, in one statement; stale ones are absent from the result.

    Locks the task instances in id order, waiting for concurrent writers. Costs one round trip for any number of
    changes; give at most one change for a task instance.
    """
    if not changes:
        return []
    effects = Effects(
        starts=any(change.to_state is TaskState.RUNNING for change in changes),
        ends_attempt=any(change.from_state is TaskState.RUNNING for change in changes),
        accounts=any(change.account and change.to_state in TERMINAL for change in changes),
    )
    rows = _statement_for_changes(effects).execute(tx, {"changes": json.dumps([_row(change) for change in changes])})
    return [to_applied(row) for row in rows]


def statement(
    source: str, types: Mapping[str, str], effects: Effects, *, skip_locked: bool, extra: str = "NULL AS extra"
) -> Prepared:
    """Compose the one statement over a source query whose parameters have the given Postgres types.

    ``source`` must yield the columns of `_COLUMNS`; ``extra`` is one more column of the result, over ``moved``.
    ``skip_locked`` leaves out rows another transaction holds instead of waiting for it: right for admission, which
    takes whatever it can have, wrong for an end that must be written.
    """
    parts = [_CHANGE.format(source=source), _LOCKED.format(wait="SKIP LOCKED" if skip_locked else ""), _MOVED, _EVENT]
    if effects.starts:
        parts.append(_FORGET_XCOMS)
    if effects.ends_attempt:
        parts.append(_ATTEMPT)
    if effects.accounts:
        parts.append(_INBOX)
    return Prepared("WITH " + ",\n".join(parts) + _RESULT.format(extra=extra), types)


def to_applied(row: Row[Any]) -> Applied:
    """Turn a row of the statement's result into an `Applied`."""
    return Applied(
        row.id,
        row.run_pk,
        row.dag_id,
        row.task_id,
        row.map_index,
        row.attempt_id,
        TaskState(row.state),
        row.queue,
        row.priority_weight,
    )


def _row(change: Change) -> dict[str, Any]:
    row = {name: getattr(change, name) for name in _CHANGE_FIELDS}
    if change.cause is not None:
        row["cause"] = storable(change.cause)  # a message of user code may hold anything
    if change.not_before is not None:
        row["not_before"] = change.not_before.isoformat()
    return {name: value for name, value in row.items() if value is not None}


@lru_cache
def _statement_for_changes(effects: Effects) -> Prepared:
    return statement(_FROM_CHANGES, {"changes": "jsonb"}, effects, skip_locked=False)


_CHANGE_FIELDS = tuple(Change.__dataclass_fields__)

_COLUMNS = """ti_id bigint, from_state text, to_state text, reason text, attempt_id uuid, actor text, cause text,
    worker_id uuid, hostname text, pid integer, not_before timestamptz, delay_seconds double precision,
    user_failure boolean, infra_failure boolean, exit_code integer, peak_rss_bytes bigint, account boolean"""

_FROM_CHANGES = f"SELECT * FROM jsonb_to_recordset(:changes) AS c ({_COLUMNS})"

_CHANGE = "change AS MATERIALIZED ({source})"

# The array is for the planner: it takes a set from JSON for a hundred rows, and would rather read a table of a few
# thousand task instances from end to end; of an array it expects ten, and takes the index.
_LOCKED = """locked AS MATERIALIZED (
    SELECT ti.id FROM task_instance ti JOIN change c ON c.ti_id = ti.id
    WHERE ti.id = ANY (ARRAY(SELECT ti_id FROM change))
      AND ti.state = c.from_state AND ti.attempt_id IS NOT DISTINCT FROM c.attempt_id
    ORDER BY ti.id FOR UPDATE OF ti {wait})"""

# The fence is repeated here: the row may have changed while `locked` waited for it.
_MOVED = """moved AS (
    UPDATE task_instance ti SET
        state = c.to_state,
        reason = c.reason,
        cause = c.cause,
        attempt_id = CASE c.to_state WHEN 'queued' THEN gen_random_uuid() WHEN 'scheduled' THEN NULL
                     WHEN 'none' THEN NULL ELSE ti.attempt_id END,
        try_number = ti.try_number + CASE c.to_state WHEN 'running' THEN 1 ELSE 0 END,
        user_failures = CASE c.to_state WHEN 'none' THEN 0
                        ELSE ti.user_failures + coalesce(c.user_failure, false)::integer END,
        infra_failures = CASE c.to_state WHEN 'none' THEN 0
                         ELSE ti.infra_failures + coalesce(c.infra_failure, false)::integer END,
        not_before = CASE WHEN c.to_state IN ('up_for_retry', 'up_for_reschedule', 'deferred')
            THEN coalesce(c.not_before, clock_timestamp() + make_interval(secs => coalesce(c.delay_seconds, 0))) END,
        scheduled_at = CASE c.to_state WHEN 'scheduled' THEN clock_timestamp() WHEN 'none' THEN NULL
                       ELSE ti.scheduled_at END,
        queued_at = CASE c.to_state WHEN 'queued' THEN clock_timestamp() WHEN 'none' THEN NULL
                    WHEN 'scheduled' THEN NULL ELSE ti.queued_at END,
        published_at = CASE WHEN c.to_state IN ('queued', 'scheduled', 'none') THEN NULL ELSE ti.published_at END,
        publish_count = CASE WHEN c.to_state IN ('queued', 'scheduled', 'none') THEN 0 ELSE ti.publish_count END,
        started_at = CASE c.to_state WHEN 'running' THEN clock_timestamp() WHEN 'none' THEN NULL
                     ELSE ti.started_at END,
        ended_at = CASE WHEN c.to_state IN ('success', 'failed', 'skipped', 'upstream_failed', 'removed',
                        'up_for_retry') THEN clock_timestamp() END,
        worker_id = CASE c.to_state WHEN 'running' THEN c.worker_id WHEN 'scheduled' THEN NULL WHEN 'none' THEN NULL
                    ELSE ti.worker_id END,
        hostname = CASE c.to_state WHEN 'running' THEN c.hostname ELSE ti.hostname END,
        pid = CASE c.to_state WHEN 'running' THEN c.pid ELSE ti.pid END,
        cancel_requested_at = CASE WHEN c.to_state IN ('scheduled', 'none') THEN NULL ELSE ti.cancel_requested_at END,
        cancelled_by = CASE WHEN c.to_state IN ('scheduled', 'none') THEN NULL ELSE ti.cancelled_by END
    FROM change c, locked
    WHERE ti.id = ANY (ARRAY(SELECT id FROM locked)) AND ti.id = c.ti_id AND locked.id = ti.id
      AND ti.state = c.from_state AND ti.attempt_id IS NOT DISTINCT FROM c.attempt_id
    RETURNING ti.*, c.from_state, c.attempt_id AS fence, c.actor, c.exit_code, c.peak_rss_bytes, c.account)"""

_EVENT = """event AS (
    INSERT INTO ti_event (ti_id, run_pk, attempt_id, from_state, to_state, reason, actor, cause)
    SELECT id, run_pk, coalesce(attempt_id, fence), from_state, state, reason, actor, cause FROM moved)"""

_FORGET_XCOMS = """forgotten AS (
    DELETE FROM xcom x USING moved m
    WHERE m.state = 'running' AND m.try_number > 1
      AND x.run_pk = m.run_pk AND x.task_id = m.task_id AND x.map_index = m.map_index)"""

_ATTEMPT = """ended AS (
    INSERT INTO attempt (id, ti_id, run_pk, try_number, state, reason, cause, exit_code, peak_rss_bytes, worker_id,
                         hostname, pid, queued_at, started_at, ended_at)
    SELECT fence, id, run_pk, try_number, state, reason, cause, exit_code, peak_rss_bytes, worker_id, hostname, pid,
           queued_at, started_at, clock_timestamp()
    FROM moved WHERE from_state = 'running')"""

_INBOX = """inbox AS (
    INSERT INTO unaccounted (ti_id, run_pk, state)
    SELECT id, run_pk, state FROM moved
    WHERE coalesce(account, true) AND state IN ('success', 'failed', 'skipped', 'upstream_failed', 'removed'))"""

_RESULT = """
SELECT id, run_pk, dag_id, task_id, map_index, CAST(attempt_id AS text) AS attempt_id, state, queue, priority_weight,
    {extra}
FROM moved ORDER BY priority_weight DESC, id"""

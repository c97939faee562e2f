"""An idle or busy moment costs the same with much history: hot queries never read the large tables from end to end.

The database gets some ten thousand rows of ended runs and a few of live ones; each hot function is called, and the plan
of every statement it ran is looked at.
"""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from sqlalchemy import event, text

from dflow.core.states import RunState, TaskState
from dflow.store import dags, pools, runs, tasks, workers, xcoms
from dflow.store.engine import Store
from dflow.store.xcoms import NewXCom

from .world import add_dag, add_run, add_worker, ids, move, queue, spec, start

pytestmark = pytest.mark.integration
LARGE = {"task_instance", "dag_run", "xcom", "ti_event", "attempt", "log_chunk"}

_HISTORY = """
INSERT INTO dag (dag_id, bundle_name, path, version_id, bundle_hash)
    SELECT 'old' || n, 'dags', 'old.py', 1, 'h' FROM generate_series(1, 100) n;
INSERT INTO dag_run (dag_id, run_id, run_type, state, run_after, dag_version_id, bundle_hash, path, max_active_tasks,
                     triggered_by, started_at, ended_at)
    SELECT 'old' || d, 'r' || n, 'manual', 'success', now() - n * interval '1 hour', 1, 'h', 'old.py', 16, 'test',
           now(), now()
    FROM generate_series(1, 100) d, generate_series(1, 20) n;
INSERT INTO task_instance (run_pk, dag_id, task_id, state, pool, queue, worker_id, attempt_id)
    SELECT r.id, r.dag_id, 't' || n, 'success', 'default_pool', 'default', gen_random_uuid(), gen_random_uuid()
    FROM dag_run r, generate_series(1, 10) n;
INSERT INTO xcom (run_pk, task_id, key, value) SELECT run_pk, task_id, 'return_value', '1' FROM task_instance;
INSERT INTO dag_run (dag_id, run_id, run_type, state, run_after, dag_version_id, bundle_hash, path, max_active_tasks,
                     triggered_by)
    SELECT 'busy', 'q' || n, 'manual', 'queued', now() - interval '1 day', 1, 'h', 'd.py', 16, 'test'
    FROM generate_series(1, 2000) n;
"""


@pytest.fixture
def world(store):
    """Much history, a DAG with a long backlog at its limit, and one live run."""
    with store.begin() as tx:
        add_dag(tx, spec("busy", max_active_runs=1))
        add_dag(tx, spec("live", task_ids=tuple("abcde")))
        tx.exec_driver_sql(_HISTORY)
        worker = add_worker(tx)
        run = add_run(tx, "live")
        runs.start_queued(tx, 10)
        named = ids(tx, run)
        start(tx, named["a"], worker)
        queue(tx, named["b"])
        move(tx, named["c"], TaskState.SCHEDULED)
        start(tx, named["d"], worker)
        move(tx, named["d"], TaskState.UP_FOR_RETRY, delay_seconds=-1.0)
        move(tx, named["e"], TaskState.SKIPPED)
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
    return store, run, named, worker


@contextmanager
def statements_of(store):
    """Collect what is executed on the store's connections."""
    seen = []

    def remember(_connection, _cursor, statement, parameters, _context, _many):
        seen.append((statement, parameters))

    event.listen(store.engine, "before_cursor_execute", remember)
    try:
        yield seen
    finally:
        event.remove(store.engine, "before_cursor_execute", remember)


def scanned_whole(tx, statement, parameters):
    """The large tables a statement's plan reads from end to end."""
    plan = tx.exec_driver_sql("EXPLAIN (FORMAT JSON) " + statement, parameters).scalar_one()
    document = plan if isinstance(plan, list) else json.loads(plan)
    found, nodes = set(), [document[0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if node["Node Type"] == "Seq Scan":
            found.add(node["Relation Name"])
    return found & LARGE


HOT = {
    "start_queued": lambda tx, w: runs.start_queued(tx, 10),
    "lock_for_planning": lambda tx, w: runs.lock_for_planning(tx, 10),
    "lock": lambda tx, w: runs.lock(tx, [w.run.id]),
    "take_inbox": lambda tx, w: runs.take_inbox(tx, [w.run.id]),
    "load_view": lambda tx, w: runs.load_view(tx, w.run.id),
    "bump_version": lambda tx, w: runs.bump_version(tx, [w.run.id]),
    "end": lambda tx, w: runs.end(tx, w.run.id, RunState.SUCCESS, None),
    "timed_out": lambda tx, w: runs.timed_out(tx),
    "cancel": lambda tx, w: runs.cancel(tx, "live", w.run.run_id, "ann"),
    "create": lambda tx, w: add_run(tx, "live"),
    "get": lambda tx, w: runs.get(tx, "live", w.run.run_id),
    "list": lambda tx, w: runs.list_(tx, limit=10),
    "list unfinished": lambda tx, w: runs.list_(tx, states=[RunState.RUNNING], limit=10),
    "list of a dag": lambda tx, w: runs.list_(tx, "live", limit=10),
    "state_counts": lambda tx, w: runs.state_counts(tx, w.run.id),
    "lock_due": lambda tx, w: dags.lock_due(tx, 10),
    "due_retries": lambda tx, w: tasks.due_retries(tx, 10),
    "next_wakeup": lambda tx, w: tasks.next_wakeup(tx),
    "unpublished": lambda tx, w: tasks.unpublished(tx, 5.0, 10),
    "mark_published": lambda tx, w: tasks.mark_published(tx, [w.ids["b"]]),
    "describe_claimed": lambda tx, w: tasks.describe_claimed(tx, [w.ids["a"]]),
    "active_counts": lambda tx, w: tasks.active_counts(tx),
    "get task": lambda tx, w: tasks.get(tx, "live", w.run.run_id, "a"),
    "states": lambda tx, w: tasks.states(tx, w.run.id, ["a", "b"]),
    "renew": lambda tx, w: workers.renew(tx, w.worker.id, 30.0),
    "expire": lambda tx, w: workers.expire(tx),
    "lost_attempts": lambda tx, w: workers.lost_attempts(tx),
    "lost_attempts of": lambda tx, w: workers.lost_attempts(tx, [w.worker.id]),
    "list_live": lambda tx, w: workers.list_live(tx),
    "pool usage": lambda tx, w: pools.usage_of_all(tx),
    "xcom put": lambda tx, w: xcoms.put_many(
        tx, [NewXCom(ti_id=w.ids["a"], attempt_id=tasks.get_by_id(tx, w.ids["a"]).attempt_id, key="k", value=1)]
    ),
    "xcom pull": lambda tx, w: xcoms.pull(tx, w.run.id, task_ids=["a"]),
    "xcom pull prior": lambda tx, w: xcoms.pull(tx, w.run.id, task_ids=["a"], include_prior_dates=True),
}


class World:
    def __init__(self, run, named, worker):
        self.run, self.ids, self.worker = run, named, worker


def test_no_hot_query_reads_a_large_table_whole(world):
    store, run, named, worker = world
    offenders = {}
    for name, call in HOT.items():
        with store.engine.connect() as tx, statements_of(store) as seen:
            call(tx, World(run, named, worker))
            executed = list(seen)
            tx.rollback()  # every query meets the same world
            for statement, parameters in executed:
                if statement.startswith("PREPARE"):
                    continue
                if whole := scanned_whole(tx, statement, parameters):
                    offenders[name] = (whole, statement)
            tx.rollback()
    assert not offenders, "\n".join(f"{name}: {whole}\n{sql}" for name, (whole, sql) in offenders.items())


def test_a_backlog_of_runs_costs_one_look_at_each_dag(world):
    """2,000 runs wait for a DAG that is at its limit: starting others does not read them."""
    store, *_ = world
    with store.begin() as tx:
        runs.start_queued(tx, 10)  # the first of the backlog starts; the limit is reached then
        assert runs.start_queued(tx, 10) == []
        with statements_of(store) as seen:
            runs.start_queued(tx, 10)
        ((statement, parameters),) = seen
        plan = tx.exec_driver_sql("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, parameters).scalar_one()
        nodes, most = [plan[0]["Plan"]], 0
        while nodes:
            node = nodes.pop()
            nodes += node.get("Plans", [])
            if node.get("Relation Name") == "dag_run" or "dag_run" in node.get("Index Name", ""):
                most = max(most, node["Actual Rows"] * node["Actual Loops"])
        assert most <= 20


def test_this_check_can_fail(world):
    store, *_ = world
    with store.begin() as tx:
        assert scanned_whole(tx, "SELECT * FROM task_instance WHERE hostname = %(h)s", {"h": "x"}) == {"task_instance"}
    assert isinstance(store, Store)

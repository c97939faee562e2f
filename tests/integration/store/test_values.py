"""What tasks leave behind: XCom under the fence, log chunks, and the code they ran from; and pools."""

from __future__ import annotations

import hashlib
import uuid

import pytest

from dflow.core.errors import ConflictError, NotFoundError, SerializationError, StaleAttemptError
from dflow.core.states import TaskState
from dflow.store import bundles, logs, pools, xcoms
from dflow.store.logs import Chunk, Line
from dflow.store.xcoms import NewXCom

from .world import add_dag, add_run, add_worker, day, ids, move, queue, spec, start, with_tasks

pytestmark = pytest.mark.integration


@pytest.fixture
def tx(store):
    with store.begin() as tx:
        yield tx


def sha(content):
    return hashlib.sha256(content).hexdigest()


# XCom


@pytest.mark.parametrize("value", [None, 0, "x", [1, {"a": None}], {"t": "été"}, 1.5, True, "a\\u0000"])
def test_a_value_comes_back_as_it_was(tx, value):
    add_dag(tx)
    run = add_run(tx)
    a = ids(tx, run)["a"]
    xcoms.put(tx, ti_id=a, attempt_id=start(tx, a, add_worker(tx)), key="return_value", value=value)
    assert xcoms.get(tx, run.id, "a") == ("a", -1, value)
    assert xcoms.get(tx, run.id, "b") is None
    assert xcoms.keys(tx, run.id, "a") == ["return_value"]


def test_only_the_attempt_that_runs_may_write(tx):
    add_dag(tx)
    run = add_run(tx)
    named, worker = ids(tx, run), add_worker(tx)
    a, b = start(tx, named["a"], worker), queue(tx, named["b"])
    written = xcoms.put_many(
        tx,
        [
            NewXCom(ti_id=named["a"], attempt_id=a, key="k", value=1),
            NewXCom(ti_id=named["a"], attempt_id=a, key="k", value=2),
            NewXCom(ti_id=named["a"], attempt_id=a, key="l", value=3),
            NewXCom(ti_id=named["a"], attempt_id=str(uuid.uuid4()), key="m", value=4),
            NewXCom(ti_id=named["b"], attempt_id=b, key="k", value=5),
        ],
    )
    assert written == {a}
    assert xcoms.keys(tx, run.id, "a") == ["k", "l"]
    assert xcoms.get(tx, run.id, "a", "k").value == 2
    assert xcoms.keys(tx, run.id, "b") == []
    assert xcoms.put_many(tx, []) == set()
    move(tx, named["a"], TaskState.SUCCESS)
    with pytest.raises(StaleAttemptError):
        xcoms.put(tx, ti_id=named["a"], attempt_id=a, key="k", value=9)


@pytest.mark.parametrize("value", [object(), float("nan"), "a\x00b", "\\\x00", "\udc80", {"k": {1, 2}}])
def test_what_json_cannot_hold_is_refused(tx, value):
    with pytest.raises(SerializationError, match="'k'"):
        xcoms.put(tx, ti_id=1, attempt_id=str(uuid.uuid4()), key="k", value=value)


def test_pull(tx):
    worker = add_worker(tx)
    for dag_id in ("d", "e"):
        add_dag(tx, spec(dag_id))
    made = {
        (dag_id, n): add_run(tx, dag_id, run_id=f"r{n}", logical_date=day(n)) for dag_id in ("d", "e") for n in (1, 2)
    }
    for (dag_id, n), run in made.items():
        for task_id, ti_id in ids(tx, run).items():
            if (dag_id, n, task_id) != ("d", 2, "a"):
                xcoms.put(
                    tx,
                    ti_id=ti_id,
                    attempt_id=start(tx, ti_id, worker),
                    key="return_value",
                    value=f"{dag_id}{n}{task_id}",
                )
    one, two = made["d", 1].id, made["d", 2].id

    def values(run_pk, **where):
        return [xcom.value for xcom in xcoms.pull(tx, run_pk, **where)]

    assert values(one) == ["d1a", "d1b"]
    assert values(one, task_ids=["b"]) == ["d1b"]
    assert values(one, task_ids=["b"], map_indexes=[0]) == []
    assert values(one, key="other") == []
    assert values(two) == ["d2b"]
    assert values(two, include_prior_dates=True) == ["d1a", "d2b"]
    assert values(one, include_prior_dates=True) == ["d1a", "d1b"]
    assert values(two, dag_id="e") == ["e2a", "e2b"]
    assert values(two, dag_id="d") == ["d2b"]
    assert values(two, run_id="r1") == ["d1a", "d1b"]
    assert values(two, dag_id="e", run_id="r1") == ["e1a", "e1b"]
    assert values(two, dag_id="e", run_id="r9") == []


# Logs


def test_chunks_in_order_and_only_once(tx):
    one, other = str(uuid.uuid4()), str(uuid.uuid4())
    first = Chunk(attempt_id=one, seq=0, ti_id=1, lines=[Line(1.5, "INFO", "stdout", "hällo\n")])
    second = Chunk(attempt_id=one, seq=1, ti_id=1, lines=[Line(2.5, "ERROR", "x", "a\x00b \udc80")])
    logs.append(tx, [second, first, Chunk(attempt_id=other, seq=0, ti_id=2, lines=[])])
    logs.append(tx, [first])
    logs.append(tx, [])
    assert logs.read(tx, one, limit=1) == [first]
    (rest,) = logs.read(tx, one, after_seq=0)
    assert rest.lines == [Line(2.5, "ERROR", "x", "a\ufffdb ?")]
    assert logs.read(tx, one, after_seq=1) == []
    assert logs.next_seqs(tx, [one, other, "00000000-0000-0000-0000-000000000000"]) == {
        one: 2, other: 1, "00000000-0000-0000-0000-000000000000": 0,
    }  # fmt: skip


# Bundles


def test_bundles_are_content_addressed(tx):
    files = {"a.py": b"print(1)\x00", "b/c.py": b""}
    shas = {path: sha(content) for path, content in files.items()}
    assert bundles.missing_blobs(tx, shas.values()) == set(shas.values())
    with pytest.raises(NotFoundError, match="a.py"):
        bundles.put_bundle(tx, "dags", shas)
    bundles.put_blobs(tx, {sha(content): content for content in files.values()})
    bundles.put_blobs(tx, {sha(content): content for content in files.values()})
    bundles.put_blobs(tx, {})
    assert bundles.missing_blobs(tx, shas.values()) == set()
    made = bundles.put_bundle(tx, "dags", shas)
    assert made == bundles.put_bundle(tx, "dags", dict(reversed(shas.items()))) == bundles.hash_of(shas)
    assert bundles.manifest(tx, made) == shas
    assert bundles.blobs(tx, [*shas.values(), "none"]) == {sha(content): content for content in files.values()}
    assert bundles.put_bundle(tx, "dags", {**shas, "d.py": shas["a.py"]}) != made
    assert len(bundles.list_(tx)) == 2
    with pytest.raises(NotFoundError):
        bundles.manifest(tx, "none")
    with pytest.raises(ConflictError):
        bundles.put_blobs(tx, {"wrong": b"x"})


# Pools


def test_pools(tx):
    assert [pool.name for pool in pools.list_(tx)] == ["default_pool"]
    made = pools.set_(tx, name="db", slots=2, description="connections")
    assert made == pools.get(tx, "db")
    changed = pools.set_(tx, name="db", slots=-1, include_deferred=True)
    assert (changed.slots, changed.description, changed.include_deferred) == (-1, "connections", True)
    pools.delete(tx, "db")
    with pytest.raises(NotFoundError, match="Did you mean 'default_pool'"):
        pools.get(tx, "defaultpool")
    with pytest.raises(ConflictError):
        pools.delete(tx, "default_pool")
    with pytest.raises(ConflictError, match="-2 slots"):
        pools.set_(tx, name="db", slots=-2)


def test_usage_is_counted_from_rows(tx):
    pools.set_(tx, name="db", slots=5)
    add_dag(tx, with_tasks(spec(task_ids=("a", "b", "c", "d")), pool="db", pool_slots=2))
    named = ids(tx, add_run(tx))
    start(tx, named["a"], add_worker(tx))
    queue(tx, named["b"])
    move(tx, named["c"], TaskState.SCHEDULED)
    usage = pools.usage(tx, "db")
    assert (usage.running, usage.queued, usage.scheduled, usage.open) == (2, 2, 2, 1)
    assert [(one.name, one.open) for one in pools.usage_of_all(tx)] == [("db", 1), ("default_pool", 128)]
    with pytest.raises(ConflictError, match="6 slots"):
        pools.delete(tx, "db")
    pools.set_(tx, name="db", slots=3)
    assert pools.usage(tx, "db").open == 0
    pools.set_(tx, name="db", slots=-1)
    assert pools.usage(tx, "db").open is None

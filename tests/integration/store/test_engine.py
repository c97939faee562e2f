"""The way to Postgres: transactions, retries, broken connections, and what people are told."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from dflow.core.errors import SettingsError, StoreUnavailableError
from dflow.core.states import Reason, TaskState
from dflow.store.apply import Change, apply
from dflow.store.engine import Store

pytestmark = pytest.mark.integration
_NOTHING = Change(
    ti_id=0, from_state=TaskState.NONE, to_state=TaskState.SCHEDULED, reason=Reason.READY, attempt_id=None, actor="test"
)


def one(tx, query, **values):
    return tx.execute(text(query), values).scalar_one()


def kill_others(pg_url):
    """End every other session on this database from outside, as a server restart would."""
    with Store(pg_url, application_name="killer") as killer, killer.begin() as tx:
        return one(
            tx,
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )


def test_values_come_back_as_plain_python(store):
    with store.begin() as tx:
        row = tx.execute(
            text("SELECT CAST('2026-11-22T10:00:00+02' AS timestamptz) AS at, CAST(:j AS jsonb) AS doc"),
            {"j": '{"a": [1, null, "x"]}'},
        ).one()
    assert row.at == datetime(2026, 11, 22, 8, tzinfo=UTC)
    assert row.at.utcoffset() == timedelta(0)
    assert row.doc == {"a": [1, None, "x"]}


def test_session_settings(pg_url):
    with Store(pg_url, statement_timeout=7, application_name="dflow tester") as store, store.begin() as tx:
        shown = {name: one(tx, f"SHOW {name}") for name in (
            "timezone", "statement_timeout", "idle_in_transaction_session_timeout", "transaction_isolation",
            "application_name")}  # fmt: skip
    assert shown == {
        "timezone": "UTC",
        "statement_timeout": "7s",
        "idle_in_transaction_session_timeout": "1min",
        "transaction_isolation": "read committed",
        "application_name": "dflow tester",
    }


def test_async_commit_is_for_one_transaction_only(pg_url):
    with Store(pg_url, pool_size=1) as store:
        with store.begin(sync=False) as tx:
            assert one(tx, "SHOW synchronous_commit") == "off"
        with store.begin() as tx:
            assert one(tx, "SHOW synchronous_commit") == "on"


def test_a_block_that_raises_leaves_nothing(store):
    def insert_and_fail():
        with store.begin() as tx:
            tx.execute(text("INSERT INTO pool (name, slots) VALUES ('p', 1)"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        insert_and_fail()
    with store.begin() as tx:
        assert one(tx, "SELECT count(*) FROM pool WHERE name = 'p'") == 0


def test_deadlock_is_run_anew(store):
    with store.begin() as tx:
        tx.execute(text("INSERT INTO pool (name, slots) VALUES ('p', 0), ('q', 0)"))
    both_hold_one = threading.Barrier(2)
    runs = []

    def add(names):
        tries = 0

        def work(tx):
            nonlocal tries
            tries += 1
            for position, name in enumerate(names):
                tx.execute(text("UPDATE pool SET slots = slots + 1 WHERE name = :n"), {"n": name})
                if position == 0 and tries == 1:
                    both_hold_one.wait(30)
            return tries

        runs.append(store.run(work))

    threads = [threading.Thread(target=add, args=(names,)) for names in (("p", "q"), ("q", "p"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(runs) == [1, 2]
    with store.begin() as tx:
        assert one(tx, "SELECT array_agg(slots) FROM pool WHERE name IN ('p', 'q')") == [2, 2]


def test_an_endless_conflict_is_raised_in_the_end(store):
    tries = []

    def work(tx):
        tries.append(1)
        tx.execute(text("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"))

    with pytest.raises(OperationalError, match="again"):
        store.run(work)
    assert 1 < len(tries) < 20


def test_other_errors_are_not_retried(store):
    tries = []

    def work(tx):
        tries.append(1)
        tx.execute(text("SELECT nonsense"))

    with pytest.raises(ProgrammingError):
        store.run(work)
    assert len(tries) == 1


def test_run_replaces_a_connection_broken_in_the_pool(pg_url):
    with Store(pg_url, pool_size=1) as store:
        store.run(lambda tx: one(tx, "SELECT 1"))
        assert kill_others(pg_url) == 1
        assert store.run(lambda tx: one(tx, "SELECT 2")) == 2


def test_run_replaces_a_connection_that_breaks_before_the_commit(pg_url):
    tries = []

    def work(tx):
        tries.append(1)
        tx.execute(text("INSERT INTO pool (name, slots) VALUES ('p', 1)"))
        if len(tries) == 1:
            kill_others(pg_url)
        return one(tx, "SELECT count(*) FROM pool WHERE name = 'p'")

    with Store(pg_url, pool_size=1) as store:
        assert store.run(work) == 1
    assert len(tries) == 2


def test_a_commit_that_broke_is_not_repeated(pg_url):
    """Nobody knows whether it happened, so the work must not be done twice here."""
    tries = []
    with Store(pg_url, pool_size=1) as store:
        event.listen(store.engine, "commit", lambda _connection: kill_others(pg_url))
        with pytest.raises(StoreUnavailableError):
            store.run(lambda tx: tries.append(one(tx, "SELECT 1")))
    assert tries == [1]


def test_a_full_pool_says_which_setting(pg_url, monkeypatch):
    with Store(pg_url, pool_size=1) as store, store.begin():
        monkeypatch.setattr(store.engine.pool, "_timeout", 0.1)
        with pytest.raises(StoreUnavailableError, match="sql_alchemy_pool_size"):
            store.run(lambda tx: None)


def test_unprepared_on_request(pg_url):
    for suffix, expected in (("", 1), ("&prepared=off", 0)):
        with Store(pg_url + suffix) as store, store.begin() as tx:
            apply(tx, [_NOTHING])
            assert one(tx, "SELECT count(*) FROM pg_prepared_statements") == expected


def test_begin_says_that_the_database_went_away(pg_url):
    def work(store):
        with store.begin() as tx:
            kill_others(pg_url)
            one(tx, "SELECT 1")

    with Store(pg_url, pool_size=1) as store:
        with pytest.raises(StoreUnavailableError):
            work(store)
        with store.begin() as tx:  # and the next transaction has a new connection
            assert one(tx, "SELECT 1") == 1


def test_begin_checks_a_connection_that_idled(pg_url, monkeypatch):
    monkeypatch.setattr("dflow.store.engine._PING_AFTER_IDLE_SECONDS", 0.0)
    with Store(pg_url, pool_size=1) as store:
        with store.begin() as tx:
            one(tx, "SELECT 1")
        kill_others(pg_url)
        with store.begin() as tx:
            assert one(tx, "SELECT 1") == 1


def begin_only(store):
    with store.begin():
        pass


def run_nothing(store):
    store.run(lambda tx: None)


@pytest.mark.parametrize("use", [begin_only, run_nothing])
def test_no_server_is_one_clear_message(tmp_path, use):
    url = f"postgresql://ann:s3cret@/flow?host={tmp_path}"
    with Store(url, connect_timeout=1) as store, pytest.raises(StoreUnavailableError) as error:
        use(store)
    assert str(tmp_path) in str(error.value)
    assert "/flow" in str(error.value)
    assert "database.sql_alchemy_conn" in str(error.value)
    assert "s3cret" not in str(error.value)


def test_missing_database_says_so(pg_url):
    with Store(pg_url.replace("/t_", "/nowhere_")) as store, pytest.raises(StoreUnavailableError, match="Create it"):
        begin_only(store)


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://a@b/c", "postgresql+asyncpg://a:s3cret@b/c"])
def test_wrong_urls_are_settings_errors(url):
    with pytest.raises(SettingsError) as error:
        Store(url)
    assert "database.sql_alchemy_conn" in str(error.value)
    assert "s3cret" not in str(error.value)


def test_the_driver_may_be_named_and_options_given(pg_url):
    url = pg_url.replace("postgresql://", "postgresql+psycopg2://")
    url += ("&" if "?" in url else "?") + "options=-c%20work_mem%3D5MB"
    with Store(url) as store, store.begin() as tx:
        assert one(tx, "SHOW work_mem") == "5MB"
        assert one(tx, "SHOW timezone") == "UTC"


def test_up_since_is_in_the_past(store):
    with store.begin() as tx:
        assert store.database_up_since(tx) <= one(tx, "SELECT now()")

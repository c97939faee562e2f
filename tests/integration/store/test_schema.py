"""Migrations: whole or not at all, safe side by side, there and back."""

from __future__ import annotations

import re
import threading

import pytest
from sqlalchemy import text

from dflow.core.errors import SchemaError
from dflow.store import schema
from dflow.store.engine import Store

pytestmark = pytest.mark.integration

_TABLES = text("SELECT array_agg(tablename::text ORDER BY tablename) FROM pg_tables WHERE schemaname = 'public'")


@pytest.fixture
def empty(empty_pg_url):
    with Store(empty_pg_url) as store:
        yield store


def tables(store):
    with store.begin() as tx:
        return tx.execute(_TABLES).scalar_one() or []


def execute(store, statement):
    with store.begin() as tx:
        tx.execute(text(statement))


def test_an_empty_database_is_told_from_a_current_one(empty):
    assert schema.current(empty) is None
    with pytest.raises(SchemaError, match="dflow db migrate"):
        schema.check(empty)
    assert schema.migrate(empty) == schema.newest()
    assert schema.current(empty) == schema.newest()
    schema.check(empty)


def test_migrating_twice_changes_nothing(store):
    execute(store, "INSERT INTO pool (name, slots) VALUES ('kept', 3)")
    schema.migrate(store)
    with store.begin() as tx:
        assert tx.execute(text("SELECT slots FROM pool WHERE name = 'kept'")).scalar_one() == 3


def test_several_migrate_at_once(empty_pg_url):
    gate = threading.Barrier(4)
    results = []

    def migrate():
        with Store(empty_pg_url) as store:
            gate.wait(30)
            results.append(schema.migrate(store))

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [schema.newest()] * 4


def test_down_and_up_again(store):
    before = tables(store)
    schema.downgrade(store, "base")
    assert tables(store) == ["alembic_version"]
    assert schema.current(store) is None
    schema.migrate(store)
    assert tables(store) == before


def test_reset_empties_the_database(store):
    execute(store, "INSERT INTO pool (name, slots) VALUES ('gone', 3)")
    schema.reset(store)
    schema.check(store)
    with store.begin() as tx:
        assert tx.execute(text("SELECT array_agg(name) FROM pool")).scalar_one() == ["default_pool"]


def test_a_newer_schema_is_left_alone(store):
    execute(store, "UPDATE alembic_version SET version_num = '9999'")
    for touch in (schema.check, schema.migrate, schema.reset):
        with pytest.raises(SchemaError, match="Upgrade dflow"):
            touch(store)
    assert "task_instance" in tables(store)


def test_unknown_revisions_are_refused(store):
    with pytest.raises(SchemaError, match="no schema revision 'x'"):
        schema.downgrade(store, "x")
    with pytest.raises(SchemaError, match="no schema revision 'x'"):
        schema.sql(to_revision="x")


def test_a_table_in_use_stops_the_migration(store, monkeypatch):
    monkeypatch.setattr(schema, "_TABLE_WAIT_SECONDS", 1)
    with store.begin() as reader:
        reader.execute(text("SELECT * FROM pool"))
        with pytest.raises(SchemaError, match="in use"):
            schema.downgrade(store, "base")
    assert "pool" in tables(store)


def test_offline_sql_makes_the_same_schema(empty, store):
    script = schema.sql()
    body = re.sub(r"^(BEGIN|COMMIT);$", "", script, flags=re.MULTILINE)
    with empty.begin() as tx:
        tx.connection.cursor().execute(body)  # as psql would: no parameters, so a percent sign is one
    schema.check(empty)
    assert tables(empty) == tables(store)

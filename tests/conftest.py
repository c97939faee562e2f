"""The harness: one embedded Postgres and one Redis for a whole session, a fresh database and cluster for each test.

Everything is lazy: unit tests start nothing. Databases are cloned from a migrated template (CREATE DATABASE ...
TEMPLATE), brokers are told apart by their key prefix, directories are temporary, and what was started is really stopped
at the end, which the fixtures assert.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from dflow import settings as settings_module
from dflow.embedded import PostgresServer, RedisServer
from dflow.embedded.locations import postgres_url
from dflow.embedded.postgres import find_installations
from dflow.settings import Settings
from dflow.store.engine import Store
from tests.support import Cluster

_TEMPLATE = "dflow_template"
_QUICK: dict[str, str] = {
    "core.load_examples": "false",
    "core.dags_are_paused_at_creation": "false",
    "core.default_task_retry_delay": "0.1",
    "scheduler.poll_interval": "0.2",
    "scheduler.republish_after": "2",
    "dag_processor.scan_interval": "0.3",
    "worker.lease_seconds": "8",
    "worker.drain_grace": "5",
    "worker.log_flush_interval": "0.1",
    "logging.logging_level": "INFO",
}


@pytest.fixture(scope="session")
def server_dir() -> Iterator[Path]:
    """A directory of the session with a path short enough for Unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="dflow-test-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def postgres_server(server_dir: Path) -> Iterator[PostgresServer]:
    """The session's Postgres. Not synced to disk: its data is thrown away.

    `DFLOW_TEST_POSTGRES=15` takes an installation of that major version instead of the newest.
    """
    major = os.environ.get("DFLOW_TEST_POSTGRES")
    server = PostgresServer(
        server_dir / "data",
        server_dir / "pg",
        server_dir / "postgres.log",
        installations=[one for one in find_installations() if major in (None, str(one.major))],
        settings={"fsync": "off", "full_page_writes": "off", "max_connections": "200"},
    )
    server.start()
    identity = server.identity
    yield server
    server.stop()
    assert identity is not None
    assert identity.find() is None, "Postgres was left running"


@pytest.fixture(scope="session")
def redis_server(server_dir: Path) -> Iterator[RedisServer]:
    """The session's Redis; tests tell theirs apart by `celery.queue_prefix`."""
    server = RedisServer(server_dir / "redis", server_dir / "r" / "redis.sock", server_dir / "redis.log")
    server.start()
    yield server
    server.stop()
    assert server.identity is None, "Redis was left running"


@pytest.fixture
def own_redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test alone, to be flushed, stopped and killed."""
    sockets = Path(tempfile.mkdtemp(prefix="dflow-test-", dir="/tmp"))
    server = RedisServer(tmp_path / "redis", sockets / "redis.sock", tmp_path / "redis.log")
    server.start()
    yield server
    server.stop()
    shutil.rmtree(sockets)


@pytest.fixture(scope="session")
def template_database(postgres_server: PostgresServer) -> str:
    """A migrated database to clone from; nobody is connected to it."""
    from dflow.store import schema

    _execute(postgres_server, f'CREATE DATABASE "{_TEMPLATE}"')
    store = Store(postgres_url(postgres_server.socket_dir, _TEMPLATE), application_name="template")
    try:
        schema.migrate(store)
    finally:
        store.close()
    return _TEMPLATE


@pytest.fixture
def empty_pg_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The address of a database with nothing in it, dropped afterwards."""
    yield from _database(postgres_server, "template1")


@pytest.fixture
def pg_url(postgres_server: PostgresServer, template_database: str) -> Iterator[str]:
    """The address of a freshly migrated database, dropped afterwards whoever is still connected."""
    yield from _database(postgres_server, template_database)


@pytest.fixture
def store(pg_url: str) -> Iterator[Store]:
    """A store on a freshly migrated database."""
    store = Store(pg_url, pool_size=10, application_name="test")
    yield store
    store.close()


@pytest.fixture
def make_settings(tmp_path: Path, pg_url: str, redis_server: RedisServer) -> Callable[..., Settings]:
    """Return settings of this test's database and broker with short times, varied by ``{"section.key": "text"}``."""
    prefix = f"t{uuid.uuid4().hex[:10]}:"

    def make(values: dict[str, Any] | None = None, *, broker_url: str | None = None) -> Settings:
        base = {
            "database.sql_alchemy_conn": pg_url,
            "celery.broker_url": broker_url or redis_server.url,
            "celery.queue_prefix": prefix,
            "core.dags_folder": str(tmp_path / "dags"),
        }
        texts = {**_QUICK, **base, **(values or {})}
        env = {"DFLOW__" + key.upper().replace(".", "__"): str(value) for key, value in texts.items()}
        home = tmp_path / "home"
        (home / "logs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dags").mkdir(exist_ok=True)
        return settings_module.load(home=home, env=env)

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """The settings of this test."""
    return make_settings()


@pytest.fixture
def make_cluster(
    store: Store, tmp_path: Path, make_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> Iterator[Callable[..., Cluster]]:
    """Return a function that makes a cluster (not started) with this test's settings, varied or given whole."""
    made: list[Cluster] = []
    request.node.stash[_CLUSTERS] = made

    def make(values: dict[str, Any] | None = None, *, settings: Settings | None = None) -> Cluster:
        logs = tmp_path / f"logs-{len(made)}"
        logs.mkdir()
        made.append(Cluster(settings or make_settings(values), store, logs))
        return made[-1]

    yield make
    problems = []
    for cluster in made:
        try:
            cluster.stop()
        except AssertionError as error:
            problems.append(str(error))
    assert not problems, problems


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A cluster of this test, not started: ``cluster.start(workers=2)``."""
    return make_cluster()


_CLUSTERS = pytest.StashKey[list[Cluster]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show what the components of a failed test's clusters said."""
    report = yield
    if report.failed:
        for cluster in item.stash.get(_CLUSTERS, []):
            report.sections += [(f"{name}", text) for name, text in cluster.log_tails()]
    return report


def _database(server: PostgresServer, template: str) -> Iterator[str]:
    name = f"t_{uuid.uuid4().hex[:12]}"
    _execute(server, f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
    yield postgres_url(server.socket_dir, name)
    _execute(server, f'DROP DATABASE "{name}" WITH (FORCE)')


def _execute(server: PostgresServer, statement: str) -> None:
    connection = psycopg2.connect(postgres_url(server.socket_dir, "postgres"))
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()

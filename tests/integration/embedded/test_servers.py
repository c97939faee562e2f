"""The embedded servers themselves: started for real, killed, orphaned, refused."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psycopg2
import pytest

from dflow.core.errors import ServerStartError
from dflow.embedded import PostgresServer, RedisServer
from dflow.embedded import postgres as postgres_module
from dflow.embedded.process import ProcessIdentity, end
from tests.support import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def home():
    directory = Path(tempfile.mkdtemp(prefix="dflow test ", dir="/tmp"))  # with a space, as people have
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def postgres(home):
    server = PostgresServer(home / "data", home / "s", home / "logs" / "pg.log", settings={"fsync": "off"})
    yield server
    server.stop()


@pytest.fixture
def redis(home):
    server = RedisServer(home / "redis", home / "r" / "redis.sock", home / "logs" / "redis.log")
    yield server
    server.stop()


def query(server, statement):
    connection = psycopg2.connect(server.url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone()[0] if cursor.description else None
    finally:
        connection.close()


def ping(server):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server.socket_path))
        connection.sendall(b"PING\r\n")
        return connection.recv(10)


def test_postgres_keeps_its_data_over_a_restart_and_listens_on_no_port(postgres):
    postgres.start()
    first = postgres.identity
    postgres.start()
    assert postgres.identity == first, "starting a running server is harmless"
    query(postgres, "CREATE TABLE t AS SELECT 42 AS answer")
    assert query(postgres, "SHOW listen_addresses") == ""
    assert query(postgres, "SELECT current_user") == "dflow"
    postgres.stop()
    assert first.find() is None
    assert not postgres.socket_dir.joinpath(".s.PGSQL.5432").exists()
    postgres.start()
    assert query(postgres, "SELECT answer FROM t") == 42


def test_only_this_user_may_come_in(postgres):
    postgres.start()
    assert postgres.socket_dir.stat().st_mode & 0o077 == 0
    rules = (postgres.data_dir / "pg_hba.conf").read_text()
    assert rules == "local all all peer map=dflow\n"
    with pytest.raises(psycopg2.OperationalError, match="Peer authentication failed"):
        psycopg2.connect(postgres.url.replace("//dflow@", "//somebody@"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
def test_postgres_recovers_from_a_crash(postgres, number):
    postgres.start()
    query(postgres, "CREATE TABLE t AS SELECT 42 AS answer")
    os.kill(postgres.identity.pid, number)
    eventually(lambda: postgres.poll() is not None)
    postgres.start()
    assert query(postgres, "SELECT answer FROM t") == 42


def test_a_server_left_behind_is_stopped_before_a_new_one_starts(postgres, home):
    pid = _start_in_another_process(home, "PostgresServer(home / 'data', home / 's', home / 'pg.log', {})")
    orphan = ProcessIdentity.of(pid)
    try:
        postgres.start()
        assert orphan.find() is None
        assert query(postgres, "SELECT 1") == 1
    finally:
        end(orphan, (signal.SIGKILL, 5))


def test_a_server_ends_with_the_process_that_started_it(home):
    pid = _start_in_another_process(home, "RedisServer(home / 'redis', home / 'r' / 's', home / 'r.log')")
    eventually(lambda: (identity := ProcessIdentity.of(pid)) is None or identity.find() is None)


def test_a_pid_file_with_the_number_of_somebody_else_is_no_obstacle(postgres):
    postgres.start()
    postgres.stop()
    (postgres.data_dir / "postmaster.pid").write_text(f"{os.getpid()}\n{postgres.data_dir}\n0\n5432\n")
    postgres.start()
    assert query(postgres, "SELECT 1") == 1


def test_a_creation_that_was_interrupted_leaves_nothing_that_counts(postgres, home):
    half = home / "data.new-1"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    postgres.start()
    assert not half.exists()
    assert query(postgres, "SELECT 1") == 1


def test_a_directory_with_something_else_in_it_is_not_touched(postgres):
    postgres.data_dir.mkdir()
    (postgres.data_dir / "thesis.txt").write_text("years of work")
    with pytest.raises(ServerStartError, match="not empty"):
        postgres.start()
    assert (postgres.data_dir / "thesis.txt").read_text() == "years of work"


def test_no_space_is_one_message(postgres, monkeypatch):
    monkeypatch.setattr(postgres_module, "NEEDED_BYTES", 2**60)
    with pytest.raises(ServerStartError, match=r"No space.*MB are free.*\$DFLOW_HOME"):
        postgres.start()
    assert not postgres.data_dir.exists()


def test_a_server_that_gives_up_shows_its_last_words(postgres):
    postgres.start()
    postgres.stop()
    (postgres.data_dir / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(ServerStartError, match="no_such_setting"):
        postgres.start()


def test_redis_answers_on_its_socket_only_and_comes_back(redis):
    redis.start()
    assert ping(redis) == b"+PONG\r\n"
    assert redis.socket_path.stat().st_mode & 0o077 == 0
    first = redis.identity
    redis.kill()
    assert first.find() is None
    redis.start()
    assert ping(redis) == b"+PONG\r\n"


def test_a_redis_left_behind_is_stopped_before_a_new_one_starts(redis, home):
    redis.start()
    orphan = redis.identity
    RedisServer(home / "redis", home / "r" / "redis.sock", home / "logs" / "redis.log")._stop_left_behind()
    assert orphan.find() is None


def test_a_redis_that_gives_up_shows_its_last_words(redis, home):
    script = home / "redis-server"
    script.write_text("#!/bin/sh\necho 'no such luck'\nexit 3\n")
    script.chmod(0o755)
    broken = RedisServer(home / "redis", home / "r" / "redis.sock", home / "logs" / "redis.log", binary=script)
    with pytest.raises(ServerStartError, match="no such luck"):
        broken.start()


def _start_in_another_process(home: Path, server: str) -> int:
    """Start a server in a process that is then killed; return the server's pid. Servers given {} outlive it."""
    source = f"""
        import os, sys
        from pathlib import Path
        from dflow.embedded import PostgresServer, RedisServer
        home = Path(sys.argv[1])
        server = {server.replace(", {})", ", settings={'fsync': 'off'}, die_with_parent=False)")}
        server.start()
        print(server.identity.pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), str(home)], stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == -9
    return int(done.stdout)

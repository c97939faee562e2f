"""What belongs to a bundle, and that only what changed is read."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from dflow.services import bundle_scan
from dflow.services.bundle_scan import FolderUnavailableError, Scan, scan

DAG_FILE = "from dflow import dag\n"


def write(root: Path, path: str, text: str = "x", *, age_seconds: float = 60) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    then = time.time() - age_seconds
    os.utime(file, (then, then))
    return file


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust young files too: the change time of a file just written cannot be set back."""
    monkeypatch.setattr(bundle_scan, "_RACY_SECONDS", -1e9)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = bundle_scan._read

    def read(file: Path):  # noqa: ANN202
        seen.append(file.name)
        return real(file)

    monkeypatch.setattr(bundle_scan, "_read", read)
    return seen


def test_every_regular_file_belongs_to_the_bundle(tmp_path: Path) -> None:
    for path in ("etl.py", "sql/load.sql", "lib/__init__.py", "data.csv"):
        write(tmp_path, path, path)
    assert scan(tmp_path).manifest == {
        path: hashlib.sha256(path.encode()).hexdigest()
        for path in ("data.csv", "etl.py", "lib/__init__.py", "sql/load.sql")
    }


def test_caches_hidden_and_ignored_files_do_not(tmp_path: Path) -> None:
    for path in ("a.py", "__pycache__/a.pyc", ".git/config", ".env", "b.pyc", "draft.py", "gen/x.py", "gen/keep/y.py"):
        write(tmp_path, path)
    write(tmp_path, ".dflowignore", "draft.py\ngen/*\n!gen/keep/\n")
    assert sorted(scan(tmp_path).files) == ["a.py", "gen/keep/y.py"]


def test_each_directory_may_have_its_own_ignore_file(tmp_path: Path) -> None:
    for path in ("x.sql", "sub/x.sql", "sub/keep.sql"):
        write(tmp_path, path)
    write(tmp_path, ".dflowignore", "*.sql\n")
    write(tmp_path, "sub/.dflowignore", "!keep.sql\n")
    assert sorted(scan(tmp_path).files) == ["sub/keep.sql"]


def test_only_changed_files_are_read_again(tmp_path: Path, settled: None, reads: list[str]) -> None:
    write(tmp_path, "a.py", "a")
    write(tmp_path, "b.py", "b")
    first = scan(tmp_path)
    assert sorted(reads) == ["a.py", "b.py"]
    write(tmp_path, "b.py", "c")
    second = scan(tmp_path, first)
    assert reads[2:] == ["b.py"]
    assert second.manifest["a.py"] == first.manifest["a.py"]
    assert second.manifest["b.py"] == hashlib.sha256(b"c").hexdigest()


def test_same_size_and_modification_time_do_not_hide_a_change(tmp_path: Path, settled: None) -> None:
    file = write(tmp_path, "a.py", "one")
    first = scan(tmp_path)
    times = file.stat()
    file.write_text("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert scan(tmp_path, first).manifest != first.manifest


def test_a_file_just_written_is_read_again_next_time(tmp_path: Path, reads: list[str]) -> None:
    write(tmp_path, "a.py", age_seconds=0)
    scan(tmp_path, scan(tmp_path))
    assert reads == ["a.py", "a.py"]


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "a.py", "half")
    real_fstat, calls = os.fstat, []

    def fstat(fd: int) -> os.stat_result:
        calls.append(fd)
        if len(calls) == 2:  # after the first read, before it is compared
            file.write_text("all of it")
        return real_fstat(fd)

    monkeypatch.setattr(bundle_scan.os, "fstat", fstat)
    assert scan(tmp_path).manifest["a.py"] == hashlib.sha256(b"all of it").hexdigest()


def test_links_inside_are_followed_links_outside_are_not(tmp_path: Path) -> None:
    root, outside = tmp_path / "dags", tmp_path / "secret.py"
    outside.write_text("no")
    write(root, "..data/real.py", "yes")  # as Kubernetes mounts a ConfigMap
    (root / "etl.py").symlink_to("..data/real.py")
    (root / "leak.py").symlink_to(outside)
    (root / "dangling.py").symlink_to("nowhere.py")
    result = scan(root)
    assert result.manifest == {"etl.py": hashlib.sha256(b"yes").hexdigest()}
    assert "leak.py is left out" in result.warnings[0]


def test_a_link_to_a_directory_above_ends(tmp_path: Path) -> None:
    write(tmp_path, "sub/a.py")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "knot").symlink_to("knot")
    assert sorted(scan(tmp_path).files) == ["sub/a.py"]


def test_a_fifo_does_not_stop_the_scan(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    write(tmp_path, "a.py")
    assert sorted(scan(tmp_path).files) == ["a.py"]


def test_a_large_file_is_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_scan, "MAX_FILE_BYTES", 100)
    write(tmp_path, "data.csv", "x" * 101)
    write(tmp_path, "big.py", "x" * 101)
    result = scan(tmp_path)
    assert not result.files
    assert "big.py is left out of the bundle: 101 bytes, over the limit of 100" in result.warnings[0]
    assert set(result.unreadable) == {"big.py"}


def test_a_missing_folder_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FolderUnavailableError, match="cannot be read"):
        scan(tmp_path / "none")


def test_an_unreadable_file_keeps_its_last_known_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.py", DAG_FILE)
    first = scan(tmp_path)

    def refuse(file: Path):  # noqa: ANN202
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bundle_scan, "_read", refuse)
    second = scan(tmp_path, first)
    assert second.manifest == first.manifest
    assert second.unreadable == {"a.py": "cannot be read: Permission denied"}


def test_a_name_that_is_no_utf8_is_left_out(tmp_path: Path) -> None:
    try:
        with open(os.fsencode(tmp_path) + b"/\xff.py", "w") as handle:
            handle.write("x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    result = scan(tmp_path)
    assert not result.files
    assert "not UTF-8" in result.warnings[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from dflow import dag", True),
        ("from airflow.sdk import DAG", True),
        ("import DFLOW  # no d-a-g", False),
        ("import dflow\nDag = 1", True),
        ("dag = 1", False),
    ],
)
def test_safe_mode(tmp_path: Path, text: str, expected: bool) -> None:
    write(tmp_path, "a.py", text)
    write(tmp_path, "a.txt", text)
    files = scan(tmp_path).files
    assert files["a.py"].is_dag_candidate is expected
    assert not files["a.txt"].is_dag_candidate


def test_a_restless_data_file_is_left_alone_until_it_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_scan, "_RESTLESS_CHANGES", 3)
    result: Scan | None = None
    for number in range(8):
        for name in ("app.log", "etl.py"):
            write(tmp_path, name, "x" * number, age_seconds=1)
        result = scan(tmp_path, result)
    assert result is not None
    assert "app.log changes all the time" in result.warnings[0]
    assert result.files["app.log"].size < 7
    assert result.files["etl.py"].size == 7, "a module is always read"
    monkeypatch.setattr(bundle_scan, "_QUIET_SECONDS", 0.5)
    assert scan(tmp_path, result).files["app.log"].size == 7


def test_a_scan_of_another_folder_is_not_reused(tmp_path: Path) -> None:
    write(tmp_path, "one/a.py", "a")
    write(tmp_path, "two/a.py", "b")
    first: Scan = scan(tmp_path / "one")
    assert scan(tmp_path / "two", first).manifest != first.manifest

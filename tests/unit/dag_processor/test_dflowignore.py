"""The patterns of `.dflowignore`, held against what git itself says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dflow.services import dflowignore

CASES = [
    ("*.csv", "a.csv", True),
    ("*.csv", "deep/er/a.csv", True),
    ("*.csv", "a.csv.py", False),
    ("/top.py", "top.py", True),
    ("/top.py", "sub/top.py", False),
    ("sub/x.py", "sub/x.py", True),
    ("sub/x.py", "other/sub/x.py", False),
    ("build/", "build", False),  # a file of that name
    ("build/", "build/a.py", True),
    ("build/", "deep/build/a.py", True),
    ("docs/**", "docs/a/b.py", True),
    ("**/gen", "x/y/gen/a.py", True),
    ("a/**/b.py", "a/b.py", True),
    ("a/**/b.py", "a/x/y/b.py", True),
    ("# note", "# note", False),
    ("\\#note.py", "#note.py", True),
    ("?.py", "a.py", True),
    ("?.py", "ab.py", False),
    ("[ab].py", "a.py", True),
    ("[!ab].py", "c.py", True),
    ("[!ab].py", "a.py", False),
    ("[a-c]x.py", "bx.py", True),
    ("*.py\n!keep.py", "keep.py", False),
    ("*.py\n!keep.py", "drop.py", True),
    ("!keep.py\n*.py", "keep.py", True),
    ("drop/\n!drop/keep.py", "drop/keep.py", True),
    ("a.b", "aXb", False),
    ("a+b(1).py", "a+b(1).py", True),
    ("trailing.py   ", "trailing.py", True),
    ("*", "any/thing.py", True),
    ("a*/b", "ax/b", True),
    ("a*/b", "ax/y/b", False),
    ("", "a.py", False),
    ("/", "a.py", False),
]


def ignored(text: str, path: str) -> bool:
    """As the walk does it: a path is left out when it or one of its directories is."""
    rules = dflowignore.parse(text)
    parts = path.split("/")
    return any(
        dflowignore.is_ignored(rules, "/".join(parts[: end + 1]), is_directory=end < len(parts) - 1)
        for end in range(len(parts))
    )


@pytest.mark.parametrize(("text", "path", "expected"), CASES)
def test_pattern(text: str, path: str, expected: bool) -> None:
    assert ignored(text, path) is expected


@pytest.mark.skipif(shutil.which("git") is None, reason="git is the reference")
def test_git_agrees_with_the_table(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for text, path, expected in CASES:
        (tmp_path / ".gitignore").write_text(text + "\n")
        answer = subprocess.run(
            ["git", "-C", str(tmp_path), "check-ignore", "--no-index", "-q", path], check=False
        ).returncode
        assert (answer == 0) is expected, (text, path)


def test_rules_of_a_deeper_directory_come_later_and_win() -> None:
    rules = dflowignore.parse("*.sql") + dflowignore.parse("!*.sql", base="keep")
    assert dflowignore.is_ignored(rules, "a.sql", is_directory=False)
    assert not dflowignore.is_ignored(rules, "keep/a.sql", is_directory=False)


def test_anchored_patterns_are_relative_to_their_own_directory() -> None:
    rules = dflowignore.parse("/a.py", base="sub")
    assert dflowignore.is_ignored(rules, "sub/a.py", is_directory=False)
    assert not dflowignore.is_ignored(rules, "sub/deep/a.py", is_directory=False)


def test_an_unclosed_bracket_is_a_plain_character() -> None:
    assert ignored("[x.py", "[x.py")

"""The generated pages say what the code says, and what the documentation names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dflow.settings import declarations

ROOT = Path(__file__).parents[3]


def documents():
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_the_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "generate_docs.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_is_on_the_page():
    page = (ROOT / "docs" / "configuration.md").read_text()
    missing = [
        f"{section}.{key}" for section, keys in declarations().items() for key in keys if f"| `{key}` |" not in page
    ]
    assert not missing


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_that_are_named_as_variables_exist(document):
    known = {setting.env_name for keys in declarations().values() for setting in keys.values()}
    named = set(re.findall(r"DFLOW__[A-Z]+__[A-Z_]+", document.read_text())) - {"DFLOW__SECTION__KEY"}
    unknown = {name for name in named if name.removesuffix("_CMD") not in known | {"DFLOW__SECTION__KEY"}}
    assert not unknown


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_the_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for path in documents() for name in re.findall(r"`make ([a-z-]+)", path.read_text())}
    assert named <= targets

"""What people read is true: states, commands, and the DAGs of the tutorial."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
from typer.main import get_command

from dflow.cli.main import app
from dflow.core.states import LEGAL_TRANSITIONS, Reason, RunState, RunType, TaskState
from dflow.runtime import loader
from dflow.runtime.inline import run_dag

ROOT = Path(__file__).parents[3]
STATES = (ROOT / "docs" / "states.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
HOW_TOS = {
    f"add-a{'n' if word[0] in 'eo' else ''}-{word}"
    for word in (
        "setting",
        "state-transition",
        "service",
        "store-query",
        "migration",
        "command",
        "operator",
        "executor",
    )
}


def section(title: str) -> dict[str, str]:
    """Return the rows of the tables in a section of the page of states: first cell -> second cell."""
    body = STATES.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", body, re.MULTILINE))


def test_every_state_and_reason_is_described_and_no_other():
    assert list(section("Task instances")) == [str(state) for state in TaskState]
    assert list(section("Why")) == [str(reason) for reason in Reason]
    assert list(section("Runs")) == [*map(str, RunState), *map(str, RunType)]


def test_the_legal_transitions_are_those_of_the_code():
    written = {old: set(re.findall(r"`(\w+)`", news)) for old, news in section("Legal transitions").items()}
    assert written == {str(old): {str(new) for new in news} for old, news in LEGAL_TRANSITIONS.items()}


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "dflow" / "examples").glob("*.py")]


def commands_in(text: str) -> set[tuple[str, ...]]:
    """Return the commands a text tells people to type, in code or on a line of their own."""
    found = re.findall(r"(?:^ *|`)dflow ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", text, re.MULTILINE)
    return {tuple(word for word in words if word) for words in found}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_that_are_named_exist(document: Path):
    top: Any = get_command(app)
    unknown = []
    for words in commands_in(document.read_text()):
        noun = top.commands.get(words[0])
        if noun is None or (isinstance(noun, click.Group) and len(words) > 1 and words[1] not in noun.commands):
            unknown.append(words)
    assert not unknown


def test_commands_are_found_at_all():
    assert ("dags", "trigger") in commands_in(TUTORIAL)


@pytest.mark.parametrize("name", re.findall(r"<!-- tested: (\w+) -->", TUTORIAL))
def test_the_dags_of_the_tutorial_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = TUTORIAL.split(f"<!-- tested: {name} -->\n```python\n", 1)[1].split("```", 1)[0]
    file = tmp_path / f"{name}.py"
    file.write_text(source)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    dag = loader.load_dags(file, bundle_root=tmp_path).dags[name]
    assert str(run_dag(dag).state) == "success"


def test_there_is_a_how_to_for_each_extension_point():
    assert {path.stem for path in (ROOT / "docs" / "howto").glob("*.md")} >= HOW_TOS

"""The conf of a run: where a mistake in it is, and what the DAG's params allow."""

from __future__ import annotations

import io
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

from dflow.cli.conf import check_conf, parse_conf, parse_instant


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf.json").write_text('{"a": 2}')
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": 3}'))
    assert parse_conf(None) == {}
    assert parse_conf('{"a": 1}') == {"a": 1}
    assert parse_conf(f"@{tmp_path / 'conf.json'}") == {"a": 2}
    assert parse_conf("-") == {"a": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": x}', 'expecting value at line 1, column 7\n  {"a": x}\n        ^'),
        ('{\n "a" 1}', "line 2, column 6"),
        ("", "line 1, column 1"),
        ("[1]", "expected an object"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("@/nowhere/conf.json", "cannot read /nowhere/conf.json"),
    ],
)
def test_mistakes_are_pointed_at(text: str, message: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse_conf(text)
    assert message in caught.value.message


def test_a_long_line_is_shown_around_the_mistake() -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse_conf("{" + '"k": 1, ' * 50 + "x}")
    *_, shown, caret = caught.value.message.splitlines()
    assert len(shown) < 70
    assert shown[caret.index("^")] == "x"


def test_params() -> None:
    params = {
        "n": {"value": 1, "description": None, "schema": {"type": "integer", "maximum": 9}},
        "day": {"description": None, "schema": {"type": "string"}},
    }
    check_conf(params, {"day": "x", "more": [1]}, overrides=True)
    with pytest.raises(typer.BadParameter) as caught:
        check_conf(params, {"n": 10}, overrides=True)
    assert "'n' has the value 10" in caught.value.message
    assert "'day' has no default" in caught.value.message
    check_conf({"n": params["n"]}, {"n": "ignored"}, overrides=False)


def test_instants() -> None:
    noon = datetime(2026, 7, 1, 10, tzinfo=UTC)
    assert parse_instant("2026-07-01T12:00", "Europe/Berlin") == noon
    assert parse_instant("2026-07-01T12:00+02:00", "UTC") == noon
    assert parse_instant("2026-07-01", "UTC") == noon.replace(hour=0)
    with pytest.raises(typer.BadParameter, match="not a date"):
        parse_instant("yesterday", "UTC")

"""The forms of output, and that nothing but text reaches what is no terminal."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console

from dflow.cli.output import Output, duration, instant, show_list, show_record, warn

AT = datetime(2026, 11, 22, 10, 0, 0, 250000, tzinfo=UTC)
ROWS = [
    {"dag_id": "etl", "state": "failed", "at": AT, "duration_seconds": 75.4, "tags": ["a", "b"], "cause": "x\ty\nz"},
    {"dag_id": "long" * 60, "state": "success", "at": None, "duration_seconds": None, "tags": [], "cause": None},
]
COLUMNS = tuple(ROWS[0])


def test_json_and_yaml_are_data(capsys: pytest.CaptureFixture[str]) -> None:
    show_list(ROWS, Output.JSON, columns=COLUMNS)
    records = json.loads(capsys.readouterr().out)
    assert records[0] == {**ROWS[0], "at": "2026-11-22T10:00:00.250000+00:00"}
    show_list(ROWS, Output.YAML, columns=COLUMNS)
    assert yaml.safe_load(capsys.readouterr().out) == records
    show_list([], Output.JSON, columns=COLUMNS)
    assert json.loads(capsys.readouterr().out) == []


def test_plain_is_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    show_list(ROWS, Output.PLAIN, columns=COLUMNS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == list(COLUMNS)
    assert lines[1].split("\t") == ["etl", "failed", "2026-11-22T10:00:00.250000+00:00", "75.4", "a, b", "x y z"]
    assert len(lines) == 3


def test_a_table_off_a_terminal_is_neither_cut_nor_coloured(capsys: pytest.CaptureFixture[str]) -> None:
    show_list([{**row, "cause": "none"} for row in ROWS], Output.TABLE, columns=COLUMNS)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "long" * 60 in out
    assert "2026-11-22 10:00:00Z" in out
    assert "1m15s" in out
    assert out.splitlines()[0].split() == ["dag", "id", "state", "at", "duration", "tags", "cause"]


@pytest.mark.parametrize("width", [100, 60, 30])
def test_ids_stay_in_one_piece_while_there_is_room_and_nothing_is_lost_when_there_is_none(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr("dflow.cli.output.out", lambda: console)
    run_id = "manual__2026-11-22T10:00:00.250000+00:00"
    row = {"dag_id": "etl", "run_id": run_id, "started_at": AT, "cause": "word " * 20}
    show_list([row], Output.TABLE, columns=tuple(row))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (run_id in shown) == (width == 100)
    assert all(cell_len(line) <= width for line in shown.splitlines())
    assert shown.count("word") == 20
    assert {piece for piece in ("manual", ".25", "00:00") if piece in "".join(shown.split())}


def test_a_table_leaves_out_columns_with_nothing_in_them_and_other_forms_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"task_id": "a", "map_index": None, "count": 0, "cause": ""}]
    show_list(rows, Output.TABLE, columns=tuple(rows[0]))
    assert capsys.readouterr().out.splitlines()[0].split() == ["task", "id", "count", "cause"]
    show_list(rows, Output.PLAIN, columns=tuple(rows[0]))
    assert capsys.readouterr().out.splitlines()[0].split("\t") == list(rows[0])


def test_nothing_to_list_is_told_beside_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    show_list([], Output.TABLE, columns=COLUMNS, empty="No DAGs.")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "No DAGs.\n")


def test_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    show_record({"run_id": "r", "conf": {"a": [1]}, "is_paused": True}, Output.TABLE)
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert lines == [["run", "id", "r"], ["conf", '{"a":', "[1]}"], ["is", "paused", "yes"]]


def test_text_of_others_is_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    warn("[bold]x[/bold] [/]")
    show_list([{"cause": "[red]x[/]"}], Output.TABLE, columns=("cause",))
    captured = capsys.readouterr()
    assert captured.err == "Warning: [bold]x[/bold] [/]\n"
    assert "[red]x[/]" in captured.out


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.424, "0.42s"), (12.34, "12.3s"), (245, "4m05s"), (3725, "1h02m")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_instant() -> None:
    assert instant(AT) == "2026-11-22 10:00:00Z"

"""Draws docs/images/standalone.svg, the picture of the README: a real `dflow standalone`, its words and its live table.

It starts one with a home of its own, runs the examples, and keeps the moment at which there is most to see. Only the
name of the temporary home is made up.

python scripts/draw_standalone.py [FILE]
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from dflow.embedded import urls
from dflow.standalone import display
from dflow.standalone.display import Snapshot
from dflow.store import dags
from dflow.store.engine import Store
from dflow.store.overview import WorkerLine

ROOT: Final = Path(__file__).parent.parent
PICTURE: Final = ROOT / "docs" / "images" / "standalone.svg"
LAST_WORDS: Final = "Ctrl-C here drains and stops everything."
COLUMNS: Final = 112
FONTS: Final = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
FIRST: Final = ("example_hello", "example_trigger_rules", "example_failing")
LAST: Final = ("example_retries", "example_fan_out", "tz_report")
DEADLINE_SECONDS: Final = 60.0


class Rehearsal:
    """A `dflow standalone` of our own; a context manager."""

    def __init__(self, user_home: Path) -> None:
        self.user_home, self.home = user_home, user_home / ".dflow"
        self._output = user_home / "output"
        self._env = {name: text for name, text in os.environ.items() if not name.startswith("DFLOW")}
        self._env |= {"HOME": str(user_home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def __enter__(self) -> Rehearsal:
        with self._output.open("wb") as output:
            command = [sys.executable, "-m", "dflow", "standalone"]
            self._process = subprocess.Popen(
                command, env=self._env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_for(lambda: LAST_WORDS in self._output.read_text() or self._process.poll() is not None)
        if self._process.poll() is not None:
            raise SystemExit(self._output.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def words(self) -> str:
        """Everything it has said, up to the live table."""
        said, _, _ = self._output.read_text().partition(LAST_WORDS)
        return said + LAST_WORDS

    def trigger(self, dag_id: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dflow", "dags", "trigger", dag_id, *options]
        return subprocess.Popen(command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until the function returns something true."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("it takes too long")
        time.sleep(0.01)


def best_moment(rehearsal: Rehearsal) -> Snapshot:
    """Run the examples and return what the table showed when most tasks were running beside ended ones."""
    store = Store(urls(rehearsal.home)[0], pool_size=1, application_name="picture")
    seen: list[Snapshot] = []

    def is_over() -> bool:
        snapshot = display.read(store, 8)
        if snapshot is not None:
            seen.append(snapshot)
        return len(seen[-1].runs) == len(FIRST) + len(LAST) and all(
            run.state in ("success", "failed") for run in seen[-1].runs
        )

    try:
        wait_for(lambda: len(_workers(store)) == 2)
        wait_for(lambda: {*FIRST, *LAST} <= _dag_ids(store))
        for dag_id in FIRST:
            rehearsal.trigger(dag_id, "--wait").wait()
        started = [rehearsal.trigger(dag_id) for dag_id in LAST]
        wait_for(is_over)
        for one in started:
            one.wait()
    finally:
        store.close()
    return max(seen, key=lambda one: (len(one.runs), sum(worker.running for worker in one.workers)))


def _workers(store: Store) -> Sequence[WorkerLine]:
    snapshot = display.read(store, 1)
    return snapshot.workers if snapshot else ()


def _dag_ids(store: Store) -> set[str]:
    with store.begin() as tx:
        return {dag.dag_id for dag in dags.list_(tx)}


def draw(words: str, snapshot: Snapshot, file: Path) -> None:
    """Write the picture as SVG that needs nothing from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text("$ make run", style="bold"))
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    console.print(display.tables(snapshot))
    without_fonts = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    without_fonts = without_fonts.replace("Fira Code, monospace", FONTS)
    file.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(
        str(file), title="dflow standalone", theme=MONOKAI, code_format=without_fonts, unique_id="standalone"
    )


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    with tempfile.TemporaryDirectory(prefix="dflow-picture-") as directory, Rehearsal(Path(directory)) as rehearsal:
        snapshot = best_moment(rehearsal)
        words = rehearsal.words().replace(directory, "/home/ann")
    draw(words, snapshot, file)
    print(f"wrote {file}: {file.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()

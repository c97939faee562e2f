"""Bytes to lines. What needs file descriptors 1 and 2 of a process runs in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from dflow.runtime.logs import MAX_LINE_BYTES, LineSplitter, storable

_PROLOGUE = """
import json, logging, os, socket, subprocess, sys, threading, time
from dflow.runtime.logs import LogCapture
ours, theirs = socket.socketpair()
sent = []
capture = LogCapture(lambda lines: sent.extend(list(one) for one in lines), level="INFO", flush_interval=0.05,
                     watched=ours, on_gone=lambda: os._exit(76), max_bytes=MAX)
def tell(value):
    with open(sys.argv[1], "w") as file:
        json.dump(value, file)
"""


def _run(body: str, max_bytes: int = 50 * 1024 * 1024) -> tuple[Any, str]:
    """Run code in a process with a capture; return what it told, and its own standard error."""
    with tempfile.NamedTemporaryFile() as result:
        done = subprocess.run(
            [sys.executable, "-c", _PROLOGUE.replace("MAX", str(max_bytes)) + body, result.name],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.load(result), done.stderr


def test_lines_come_out_however_the_bytes_are_cut() -> None:
    data = "eins\nzwei äöü\n\nlast".encode()
    for size in (1, 2, 5, len(data)):
        splitter = LineSplitter()
        lines = [line for start in range(0, len(data), size) for line in splitter.feed(data[start : start + size])]
        assert [*lines, *splitter.flush()] == ["eins", "zwei äöü", "", "last"]


def test_long_lines_are_cut_between_characters() -> None:
    text = "x" + "ä" * MAX_LINE_BYTES
    for ending in ("\n", ""):
        splitter = LineSplitter()
        pieces = splitter.feed((text + ending).encode()) + splitter.flush()
        assert "".join(pieces) == text
        assert all(len(piece.encode()) <= MAX_LINE_BYTES for piece in pieces)


def test_bytes_that_are_no_text_become_text_postgres_can_store() -> None:
    splitter = LineSplitter()
    (line,) = splitter.feed(b"a\x00b\xff\xfec\r\n")
    assert line == "a\ufffdb\ufffd\ufffdc"
    assert storable("nul \x00 and surrogate \udc80") == "nul \ufffd and surrogate ?"


def test_everything_written_before_the_end_is_there_in_order() -> None:
    lines, _ = _run("""
capture.begin()
print("one")
logging.getLogger("a.b").warning("two\\nthree")
os.write(1, b"four\\n")
subprocess.run(["sh", "-c", "echo five; echo six >&2"], check=True)
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("seven")
sys.stdout.write("no end")
rest = capture.end()
tell(sent + [list(one) for one in rest])
""")
    shown = [(level, source, text) for _, level, source, text in lines]
    assert shown[:6] == [
        ("INFO", "stdout", "one"),
        ("WARNING", "a.b", "two"),
        ("WARNING", "a.b", "three"),
        ("INFO", "stdout", "four"),
        ("INFO", "stdout", "five"),
        ("ERROR", "stderr", "six"),
    ]
    assert shown[6] == ("ERROR", "root", "seven")
    assert ("ERROR", "root", "ZeroDivisionError: division by zero") in shown
    assert shown[-1] == ("INFO", "stdout", "no end")
    assert [line[0] for line in lines] == sorted(line[0] for line in lines)


def test_lines_are_sent_while_the_task_runs() -> None:
    told, _ = _run("""
capture.begin()
print("early")
deadline = time.monotonic() + 20
while not sent and time.monotonic() < deadline:
    time.sleep(0.01)
tell([sent[0][3], [one[3] for one in capture.end()]])
""")
    assert told == ["early", []]


def test_between_attempts_output_goes_to_the_workers_log() -> None:
    told, stderr = _run("""
capture.begin(); print("inside"); first = capture.end()
logging.getLogger("x").warning("outside")
print("outside too", file=sys.stderr)
capture.begin(); second = capture.end()
tell([[one[3] for one in first], [one[3] for one in second]])
""")
    assert told == [["inside"], []]
    assert "WARNING x: outside\n" in stderr
    assert "outside too\n" in stderr


def test_an_attempt_that_writes_too_much_is_cut_with_a_word() -> None:
    told, _ = _run(
        """
capture.begin()
for _ in range(3000):
    print("y" * 100)
lines = sent + [list(one) for one in capture.end()]
capture.begin(); print("next"); after = capture.end()
tell([len(lines), lines[-1][3], [one[3] for one in after]])
""",
        max_bytes=100_000,
    )
    count, last, after = told
    assert 500 < count < 1000
    assert "cut here" in last
    assert after == ["next"]


def test_a_flood_is_complete_and_a_writer_that_never_stops_does_not_hold_the_end() -> None:
    told, _ = _run("""
capture.begin()
writer = subprocess.Popen(["sh", "-c", "while :; do echo flood; sleep 0.001; done"])
for number in range(20000):
    print(number)
lines = sent + [list(one) for one in capture.end()]
writer.kill(); writer.wait()
numbers = [int(one[3]) for one in lines if one[3].isdigit()]
tell([len(numbers), numbers == sorted(numbers)])
""")
    assert told == [20000, True]


def test_a_task_may_do_what_it_likes_to_logging_and_streams() -> None:
    told, _ = _run("""
capture.begin()
logging.basicConfig(force=True, level="ERROR")
sys.stdout = sys.stderr = open(os.devnull, "w")
logging.getLogger().error("by its own handler")
capture.end(); sent.clear()
capture.begin()
print("again"); logging.info("logged")
tell([one[3] for one in capture.end()])
""")
    assert told == ["again", "logged"]


def test_a_forked_process_is_heard_through_the_pipe() -> None:
    told, _ = _run("""
capture.begin()
pid = os.fork()
if pid == 0:
    logging.getLogger("f").warning("from the fork")
    os._exit(0)
os.waitpid(pid, 0)
tell([one[3] for one in sent + capture.end()])
""")
    assert "WARNING f: from the fork" in told  # Python 3.12 and newer also warn of the fork itself


def test_the_end_of_the_agent_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROLOGUE.replace("MAX", "1000") + "capture.begin(); theirs.close(); time.sleep(60)"],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 76

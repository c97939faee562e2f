"""What a task says, caught in its own process and streamed to the agent while it runs.

Two sources become one sequence of lines: `logging` records (a handler on the root logger) and whatever arrives on file
descriptors 1 and 2, by ``print`` or by a subprocess (both descriptors are pipes into this process). Promises:

- Every complete line written before the task returned is in what `end` gives back or was sent before it: `end` empties
  the pipes itself, so it needs no marker in the stream and no waiting.
- Lines wait at most the flush interval (or until 64 KB are there). When the agent cannot take more, the task waits.
- Between attempts everything goes to the worker's own log.
- Text is storable: no NUL, no lone surrogate, lines of at most 16 KB, at most ``max_bytes`` for one attempt, after
  which one line says that the rest was cut.
"""

from __future__ import annotations

import array
import fcntl
import logging
import os
import select
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, TextIO

from dflow.core.interrupts import shielded
from dflow.runtime.client import RawLine

MAX_LINE_BYTES: Final = 16 * 1024
CHUNK_BYTES: Final = 64 * 1024
MAX_ATTEMPT_BYTES: Final = 50 * 1024 * 1024
_PIPE_BYTES: Final = 256 * 1024
_LINE_OVERHEAD: Final = 48  # what a line costs beside its text: a flood of empty lines is a flood too
_PAUSE_SECONDS: Final = 0.02  # between two looks at a busy pipe; the pipe itself is the buffer


def storable(text: str) -> str:
    """Return the text without what Postgres cannot hold in jsonb: NUL characters and lone surrogates."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-8", "replace").decode()
    return text


class LineSplitter:
    """Cuts a stream of bytes into lines, splitting those that are too long; undecodable bytes become U+FFFD."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines complete by now."""
        *whole, rest = (self._rest + data).split(b"\n")
        lines = [piece for line in whole for piece in _pieces(line)]
        while len(rest) > MAX_LINE_BYTES:
            head, rest = _cut(rest)
            lines.append(head)
        self._rest = rest
        return [_text(line) for line in lines]

    def flush(self) -> list[str]:
        """Return the last line even though its end is missing."""
        rest, self._rest = self._rest, b""
        return [_text(piece) for piece in _pieces(rest)] if rest else []


def _pieces(line: bytes) -> list[bytes]:
    if len(line) <= MAX_LINE_BYTES:
        return [line]
    pieces = []
    while len(line) > MAX_LINE_BYTES:
        head, line = _cut(line)
        pieces.append(head)
    return [*pieces, line]


def _cut(line: bytes) -> tuple[bytes, bytes]:
    """Split after at most MAX_LINE_BYTES, not inside a UTF-8 character (whose later bytes are 10xxxxxx)."""
    at = MAX_LINE_BYTES
    while at > MAX_LINE_BYTES - 4 and line[at] & 0xC0 == 0x80:
        at -= 1
    return line[:at], line[at:]


def _text(line: bytes) -> str:
    return line.removesuffix(b"\r").decode("utf-8", "replace").replace("\x00", "\ufffd")


class _Source:
    """One redirected file descriptor."""

    __slots__ = ("level", "name", "original", "reader", "splitter")

    def __init__(self, fd: int, name: str, level: str) -> None:
        self.name, self.level = name, level
        self.original = os.dup(fd)  # not inheritable: where this process wrote before
        self.reader, writer = os.pipe()
        os.set_blocking(self.reader, False)
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except (OSError, AttributeError):
            pass  # a smaller pipe only makes a flood wait sooner
        os.dup2(writer, fd)  # inheritable: subprocesses write here too
        os.close(writer)
        self.splitter = LineSplitter()

    def read(self) -> bytes:
        """Return what is in the pipe at this moment; a writer that never stops cannot keep us here."""
        waiting = array.array("i", [0])
        fcntl.ioctl(self.reader, termios.FIONREAD, waiting)
        if not waiting[0]:
            return b""
        try:
            return os.read(self.reader, waiting[0])
        except BlockingIOError:
            return b""


class LogCapture:
    """Catches the output of this process for good; make one for each task process, after its fork.

    ``send`` takes a chunk of lines to the agent and may block. ``flush_interval`` is seconds. When ``watched`` (the
    connection to the agent) is hung up, ``on_gone`` is called, from a thread, whatever the task is doing.
    """

    def __init__(
        self,
        send: Callable[[Sequence[RawLine]], None],
        *,
        level: str,
        flush_interval: float,
        watched: socket.socket,
        on_gone: Callable[[], NoReturn],
        max_bytes: int = MAX_ATTEMPT_BYTES,
    ) -> None:
        self._send = send
        self._flush_interval = flush_interval
        self._watched = watched
        self._on_gone = on_gone
        self._max_bytes = max_bytes
        self._send_lock = threading.RLock()  # taken before _lock: chunks leave in the order of their lines
        self._lock = threading.RLock()
        self._lines: list[RawLine] = []
        self._size = 0  # of _lines
        self._total = 0  # of the attempt
        self._last_at = 0.0
        self._is_cut = False
        self._is_active = False
        self._is_forked = False
        self._is_dozing = False  # the pump waits without a time limit
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        _flush_std()
        self._sources = (_Source(1, "stdout", "INFO"), _Source(2, "stderr", "ERROR"))
        self._std = _text_stream(1), _text_stream(2)
        self._worker_log = os.fdopen(os.dup(self._sources[1].original), "w", buffering=1, errors="backslashreplace")
        self._take_over_logging(level)
        os.register_at_fork(after_in_child=self._after_fork)
        threading.Thread(target=self._pump, name="dflow-logs", daemon=True).start()

    def begin(self) -> None:
        """From now on lines belong to a new attempt. What is still in the pipes does not."""
        self._restore()
        with self._send_lock, self._lock:
            self._drain()
            self._lines, self._size, self._total, self._last_at, self._is_cut = [], 0, 0, 0.0, False
            self._is_active = True
            if self._is_dozing:
                os.write(self._wake_writer, b"!")

    def end(self) -> list[RawLine]:
        """Return the lines of the attempt that were not sent yet; later ones go to the worker's log."""
        _flush_std()
        with self._send_lock, self._lock:
            self._drain()
            self._flush_partial()
            self._is_active = False
            return self._take()

    def add(self, at: float, level: str, source: str, text: str) -> None:
        """Add one record, which may be of several lines, behind everything printed before it."""
        with shielded(), self._lock:
            self._drain()
            for line in text.split("\n"):
                self._append(at, level, source, line)
        if self._size >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is there."""
        with shielded(), self._send_lock:
            with self._lock:
                lines = self._take()
            if lines:
                self._send(lines)

    def emit(self, record: logging.LogRecord, text: str) -> None:
        """Take one logging record: to the attempt, or to the worker's log when none runs."""
        if self._is_forked:
            print(f"{record.levelname} {record.name}: {text}", file=sys.stderr, flush=True)  # noqa: T201 our pipe
        elif self._is_active:
            self.add(record.created, record.levelname, record.name, text)
        else:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            self._worker_log.write(f"{stamp} {record.levelname} {record.name}: {text}\n")

    def _append(self, at: float, level: str, source: str, text: str) -> None:
        # A record was made a moment before the lines that stand before it were read from the pipes.
        at = self._last_at = max(at, self._last_at)
        size = len(text) + _LINE_OVERHEAD
        if self._total + size > self._max_bytes:
            if not self._is_cut:
                self._is_cut = True
                limit = f"{self._max_bytes / 1024 / 1024:.4g} MiB"
                self._lines.append((at, "WARNING", "dflow", f"the log of this attempt is cut here: over {limit}"))
            return
        if len(text) > MAX_LINE_BYTES:
            for start in range(0, len(text), MAX_LINE_BYTES):
                self._append(at, level, source, text[start : start + MAX_LINE_BYTES])
            return
        self._total += size
        self._size += size
        self._lines.append((at, level, source, storable(text)))

    def _take(self) -> list[RawLine]:
        lines, self._lines, self._size = self._lines, [], 0
        return lines

    def _drain(self) -> None:
        for source in self._sources:
            if data := source.read():
                if self._is_active:
                    now = time.time()
                    for line in source.splitter.feed(data):
                        self._append(now, source.level, source.name, line)
                else:
                    _write_all(source.original, data)

    def _flush_partial(self) -> None:
        now = time.time()
        for source in self._sources:
            for line in source.splitter.flush():
                if self._is_active:
                    self._append(now, source.level, source.name, line)

    def _pump(self) -> None:
        """Stream while the main thread is busy with the task, and notice the end of the agent."""
        poll = select.poll()
        poll.register(self._watched, getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR)
        poll.register(self._wake_reader, select.POLLIN)
        for source in self._sources:
            poll.register(source.reader, select.POLLIN)
        hangup = self._watched.fileno()
        was_active = False
        last_flush = time.monotonic()
        while True:
            with self._lock:
                # Doze only after a whole interval without an attempt: a busy process is never woken for a new one.
                self._is_dozing = not self._is_active and not was_active
                was_active = self._is_active
            ready = poll.poll(None if self._is_dozing else self._flush_interval * 1000)
            self._is_dozing = False
            descriptors = {descriptor for descriptor, _ in ready}
            if hangup in descriptors:
                self._on_gone()
            if self._wake_reader in descriptors:
                os.read(self._wake_reader, 64)
            with self._lock:
                self._drain()
            now = time.monotonic()
            if self._size >= CHUNK_BYTES or now - last_flush >= self._flush_interval:
                last_flush = now
                self.flush()
            if ready and self._is_active:
                time.sleep(_PAUSE_SECONDS)

    def _take_over_logging(self, level: str) -> None:
        """Make our handler the only one of the root, and move other handlers off the redirected descriptors."""
        self._level = logging.getLevelNamesMapping()[level]
        self._handler = _Handler(self)
        self._restore()
        for name in list(logging.root.manager.loggerDict):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and _descriptor(handler.stream) in (1, 2):
                    handler.setStream(self._worker_log)

    def _restore(self) -> None:
        """Undo what the last task may have done to logging and the standard streams of this warm process."""
        root = logging.root
        if root.handlers != [self._handler]:
            root.handlers[:] = [self._handler]
        if root.level != self._level:
            root.setLevel(self._level)
        sys.stdout, sys.stderr = self._std

    def _after_fork(self) -> None:
        """In a process the task forks: its lines reach us through the pipe, like those of any subprocess."""
        self._is_forked = True
        self._lock = threading.RLock()
        self._send_lock = threading.RLock()


class _Handler(logging.Handler):
    """The root handler of a task process."""

    _FORMATTER: Final = logging.Formatter("%(message)s")

    def __init__(self, capture: LogCapture) -> None:
        super().__init__()
        self._capture = capture

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self._FORMATTER.format(record)
        except Exception:  # noqa: BLE001 a bad format string must not fail the task
            text = f"{record.msg!r} % {record.args!r} (the message could not be formatted)"
        self._capture.emit(record, text)


def _text_stream(fd: int) -> TextIO:
    """A new stream: one made for a file, as Celery leaves it, cannot be told that its descriptor is a pipe now."""
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _descriptor(stream: object) -> int | None:
    try:
        return stream.fileno()  # type: ignore[attr-defined,no-any-return]
    except Exception:  # noqa: BLE001 a stream-like object may raise anything here
        return None


def _flush_std() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # the task closed or replaced it


def _write_all(fd: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass  # the worker's own output is gone; nothing is left to tell it to

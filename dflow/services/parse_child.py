"""Inside the sandbox: import one DAG file and write what it defines, as JSON, to a pipe.

`dflow.services.parse_host` forks for each file; the fork calls `parse` and never returns from it. This is the only
place besides a task's own process where user code is imported. What the file may use is limited here: memory
(RLIMIT_DATA), time of the import (an exception in the middle of it, so that the error shows where it hung), no core
dumps, no open files but the two pipes and /dev/null, a session of its own, and an end together with the host.

The answer, length-prefixed, is ``{"dags": [...], "touched": [...], "listed": [...]}`` or ``{"failure": {"message",
"traceback"}, "touched", "listed"}``. ``touched`` are the files of the bundle that were opened during the import and
``listed`` the directories that were listed: what the result depends on.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from dflow.authoring.defaults import Defaults
from dflow.authoring.spec_builder import to_spec
from dflow.core import serialization
from dflow.core.errors import DagImportError, DflowError
from dflow.runtime import loader

LENGTH: Final = struct.Struct(">I")
MAX_RESULT_BYTES: Final = 16 * 1024 * 1024  # as a string inside a frame it may double
MAX_MESSAGE_CHARS: Final = 2_000
MAX_TRACEBACK_CHARS: Final = 20_000
_REPORT_HEADROOM_BYTES: Final = 64 * 1024 * 1024
_PR_SET_PDEATHSIG: Final = 1


class ImportTimeout(BaseException):
    """The import took too long. No Exception, so that `except Exception` in a DAG file does not swallow it."""


def parse(request: Mapping[str, Any], *, result_fd: int, output_fd: int, host_pid: int) -> NoReturn:
    """Import ``request["path"]`` below ``request["root"]``, answer on ``result_fd`` and end the process."""
    exit_code = 1
    try:
        _enter_sandbox(result_fd, output_fd, host_pid)
        touched = _Touched(Path(request["root"]))
        sys.addaudithook(touched.on_event)
        answer = _import(Path(request["root"]), request["path"], request)
        _write(result_fd, {**answer, **touched.as_dict()})
        exit_code = 0
    except BaseException:  # noqa: BLE001 - the host reports the exit code and this output
        traceback.print_exc()
    finally:
        _flush()
        os._exit(exit_code)  # no atexit handlers, no waiting for threads the file may have started


def die_with_parent(expected_parent: int, with_signal: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux: prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0)
    if os.getppid() != expected_parent:
        os._exit(1)  # it ended before we asked


def _enter_sandbox(result_fd: int, output_fd: int, host_pid: int) -> None:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output_fd, 1)
    os.dup2(output_fd, 2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what was printed before a crash is not lost
    os.closerange(3, result_fd)
    os.closerange(result_fd + 1, os.sysconf("SC_OPEN_MAX"))
    os.set_inheritable(result_fd, False)
    die_with_parent(host_pid, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _import(root: Path, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
    sys.argv = [path]
    defaults = Defaults(**request["defaults"])
    memory_limit_mb = int(request["memory_limit_mb"])
    try:
        with _memory_limit(memory_limit_mb * 1024 * 1024), _time_limit(float(request["import_timeout_seconds"])):
            loaded = loader.load_dags(root / path, bundle_root=root)
            dags = [serialization.to_json(to_spec(dag, defaults)) for _, dag in sorted(loaded.dags.items())]
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of a DAG file are its errors too
        return {"failure": _describe(error, root, path, memory_limit_mb)}
    return {"dags": dags}


@contextmanager
def _memory_limit(limit_bytes: int) -> Iterator[None]:
    """Limit what may be allocated; the hard limit leaves room to report a MemoryError afterwards.

    RLIMIT_DATA (Linux 4.7) counts private writable memory. RLIMIT_AS would count mapped libraries and reservations too,
    of which numerical packages have gigabytes without using any.
    """
    if limit_bytes <= 0:
        yield
        return
    hard = limit_bytes + _REPORT_HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise ImportTimeout(
            f"the import took longer than {seconds:g} s (core.dagbag_import_timeout); "
            "move slow work from the top of the file into tasks, or raise the setting"
        )

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Touched:
    """An audit hook that notes which files of the bundle are opened, and which directories listed by user code.

    The import system lists every directory on its path; that says nothing about the file and is left out.
    """

    def __init__(self, root: Path) -> None:
        self._root = f"{root}/"
        self._files: set[str] = set()
        self._listed: set[str] = set()

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._note(self._files, arguments[0])
        elif event in {"os.listdir", "os.scandir"} and not _is_called_by_import_system():
            self._note(self._listed, "." if arguments[0] is None else arguments[0])

    def as_dict(self) -> dict[str, list[str]]:
        # Listed directories are named as `dflow.services.parse_plan` does: "conf/", "./" for the root.
        listed = sorted(f"{path}/" if path else "./" for path in self._listed)
        return {"touched": sorted(self._files), "listed": listed}

    def _note(self, into: set[str], path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file descriptor
        try:
            absolute = os.path.abspath(os.fsdecode(path))  # pure: no file is touched
        except (OSError, ValueError):
            return
        if f"{absolute}/" == self._root:
            into.add("")
        elif absolute.startswith(self._root) and "/__pycache__/" not in absolute:
            into.add(absolute[len(self._root) :])


def _is_called_by_import_system() -> bool:
    frame: FrameType | None = sys._getframe(2)
    return frame is not None and frame.f_code.co_filename.startswith("<frozen importlib")


def _describe(error: BaseException, root: Path, path: str, memory_limit_mb: int) -> dict[str, str]:
    """Return message and traceback of what went wrong, with paths as they are in the bundle."""
    trace = error.traceback if isinstance(error, DagImportError) else _user_traceback(error, f"{root}/")
    message = str(error)
    if isinstance(error, MemoryError):
        message = f"MemoryError: the import needs more than {memory_limit_mb} MiB (dag_processor.memory_limit_mb)"
    elif not isinstance(error, DflowError | ImportTimeout):
        message = "".join(traceback.format_exception_only(error)).strip()
    if not message.startswith(f"{root}/"):
        message = f"{_where(error, f'{root}/') or root / path}: {message}"
    return {
        "message": message.replace(f"{root}/", "")[:MAX_MESSAGE_CHARS],
        "traceback": trace.replace(f"{root}/", "")[-MAX_TRACEBACK_CHARS:],
    }


def _where(error: BaseException, prefix: str) -> str | None:
    """Return "file:line" of the innermost place in user code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(prefix)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _user_traceback(error: BaseException, prefix: str) -> str:
    """Format the traceback of what the loader lets through, with the frames of user code only."""
    formatted = traceback.TracebackException.from_exception(error, compact=True)
    frames = [frame for frame in formatted.stack if frame.filename.startswith(prefix)]
    formatted.stack = traceback.StackSummary.from_list(frames)
    return "".join(formatted.format(chain=False))


def _write(fd: int, answer: Mapping[str, Any]) -> None:
    body = json.dumps(answer, separators=(",", ":")).encode()
    if len(body) > MAX_RESULT_BYTES:
        message = f"the DAGs of this file take {len(body):,} bytes as JSON, over the limit of {MAX_RESULT_BYTES:,}"
        body = json.dumps({"failure": {"message": message, "traceback": ""}}).encode()
    view = memoryview(LENGTH.pack(len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def _flush() -> None:
    flushes: list[Callable[[], None]] = [sys.stdout.flush, sys.stderr.flush]
    for flush in flushes:
        try:
            flush()
        except (OSError, ValueError, AttributeError):
            pass

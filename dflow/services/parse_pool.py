"""The dag-processor's side of parsing: some parse hosts at work on a list of files.

Each of ``size`` threads owns one host process (`dflow.services.parse_host`) and gives it one file after the other.
Hosts live as long as the pool, which is one pass of the dag-processor, so an idle dag-processor has no children, and a
package that was installed meanwhile is seen by the next pass.

Promises: exactly one `Parsed` for each file whose parsing began, whatever happens to its process or to the host. What
comes back is data: specs that were decoded and checked, texts of bounded length. The environment of user code has no
setting of dflow that is a secret and no `_CMD` one.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from dflow.authoring.defaults import Defaults
from dflow.core import serialization
from dflow.core.errors import DflowError
from dflow.core.spec import DagSpec
from dflow.runtime.protocol import read_frame, write_frame
from dflow.settings import Settings, all_settings

log = logging.getLogger(__name__)

# Numerical packages start a thread for each core when they are imported, with a stack and buffers each.
_THREAD_COUNTS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_STOP_POLL_SECONDS: Final = 0.2
_HOST_GRACE_SECONDS: Final = 15.0  # beyond a file's own limit, before a silent host counts as broken


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseOptions:
    """What parsing one file may use, and what stands in for what its DAGs do not say."""

    import_timeout_seconds: float = 30.0
    timeout_seconds: float = 50.0
    memory_limit_mb: int = 1024  # 0: no limit
    defaults: Defaults = field(default_factory=Defaults)

    @classmethod
    def from_settings(cls, settings: Settings) -> ParseOptions:
        """Return what ``core.dagbag_import_timeout``, section ``[dag_processor]`` and the defaults of DAGs say."""
        return cls(
            import_timeout_seconds=settings.core.dagbag_import_timeout,
            timeout_seconds=settings.dag_processor.dag_file_processor_timeout,
            memory_limit_mb=settings.dag_processor.memory_limit_mb,
            defaults=Defaults.from_settings(settings),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a file could not be parsed. ``message`` begins with file and line where they are known."""

    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What came of one file: ``specs``, or a ``failure`` (then ``specs`` is empty)."""

    path: str
    specs: tuple[DagSpec, ...] = ()
    failure: Failure | None = None
    touched: tuple[str, ...] = ()  # files and directories ("conf/") of the bundle the result depends on
    output: str = ""  # what the file printed
    duration_seconds: float = 0.0
    peak_rss_bytes: int = 0


class ParsePool:
    """A context manager around some parse hosts; see the module. ``stop`` ends them at once, whatever they parse."""

    def __init__(self, *, size: int, options: ParseOptions, env: Mapping[str, str], stop: threading.Event) -> None:
        self._size, self._options, self._env, self._stop_requested = size, options, env, stop
        self._hosts: set[_Host] = set()
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def parse(self, root: Path, paths: Sequence[str]) -> Iterator[Parsed]:
        """Parse files below ``root``; yields results as they come; fewer than asked for after `finish` or a stop."""
        todo: queue.SimpleQueue[str] = queue.SimpleQueue()
        results: queue.SimpleQueue[Parsed | None] = queue.SimpleQueue()
        for path in paths:
            todo.put(path)
        working = min(self._size, len(paths))
        for number in range(working):
            thread = threading.Thread(target=self._work, args=(root, todo, results), name=f"parse-{number}")
            self._threads.append(thread)
            thread.start()
        while working:
            try:
                parsed = results.get(timeout=_STOP_POLL_SECONDS)
            except queue.Empty:
                if self._stop_requested.is_set():
                    self.stop()
                continue
            if parsed is None:
                working -= 1
            else:
                yield parsed

    def finish(self) -> None:
        """Begin no further file; those being parsed go on."""
        self._is_stopping.set()

    def stop(self) -> None:
        """Begin no further file and end the hosts, with what they are parsing."""
        self._is_stopping.set()
        with self._lock:
            for host in self._hosts:
                host.terminate()

    def _work(self, root: Path, todo: queue.SimpleQueue[str], results: queue.SimpleQueue[Parsed | None]) -> None:
        # The thread that starts a host must outlive it: the kernel ends the host with this thread (PR_SET_PDEATHSIG).
        host: _Host | None = None
        try:
            while not self._is_stopping.is_set():
                try:
                    path = todo.get_nowait()
                except queue.Empty:
                    return
                host = host if host is not None and host.is_usable else self._start_host()
                parsed = host.parse(root, path)
                if not host.is_usable:
                    self._close_host(host)
                if host.is_usable or not self._is_stopping.is_set():  # a stopped host says nothing about its file
                    results.put(parsed)
        except OSError:
            log.exception("cannot start a process to parse DAG files")
        finally:
            if host is not None:
                self._close_host(host)
            results.put(None)

    def _start_host(self) -> _Host:
        host = _Host(self._options, self._env)
        with self._lock:
            self._hosts.add(host)
            if self._is_stopping.is_set():
                host.terminate()
        return host

    def _close_host(self, host: _Host) -> None:
        with self._lock:
            self._hosts.discard(host)
        host.close()


class _Host:
    """One parse host process and the socket to it."""

    def __init__(self, options: ParseOptions, env: Mapping[str, str]) -> None:
        self._options = asdict(options)
        self.is_usable = True
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(options.timeout_seconds + _HOST_GRACE_SECONDS)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    # -P: the current directory is no place to import from
                    [sys.executable, "-P", "-m", "dflow.services.parse_host", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # what files print comes in the replies
                    env=dict(env),
                    start_new_session=True,  # Ctrl-C in a terminal is the dag-processor's to handle
                )
        except BaseException:
            self._sock.close()
            raise

    def parse(self, root: Path, path: str) -> Parsed:
        try:
            write_frame(self._sock, {"root": str(root), "path": path, **self._options})
            reply = read_frame(self._sock)
        except (OSError, ValueError) as error:
            return self._broken(path, str(error))
        if reply is None:
            return self._broken(path, "it ended")
        return _decode(path, reply)

    def terminate(self) -> None:
        """Ask it to end and to take its sandbox along."""
        self.is_usable = False
        self._process.terminate()

    def close(self) -> None:
        self.is_usable = False
        self._sock.close()
        self._wait()

    def _wait(self) -> int:
        """Wait for its end; a host that does not end by itself is killed, and its sandbox with it."""
        try:
            return self._process.wait(_HOST_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _broken(self, path: str, why: str) -> Parsed:
        self.is_usable = False
        self._process.terminate()
        code = self._wait()
        what = f"signal {-code} ({_signal_name(-code)})" if code < 0 else f"exit code {code}"
        message = f"{path}: the process that parses DAG files was lost ({why}, {what}); the file will be tried again"
        return Parsed(path=path, failure=Failure(message=message))


def user_code_env(settings: Settings, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of processes that import user code.

    It is ``env`` without anything of dflow's that is a secret or a command, and with the resolved values of all other
    settings, so that defaults (`core.default_timezone`, `operators.default_queue`) are the same everywhere.
    """
    secret = {setting.env_name for setting in all_settings() if setting.is_secret}
    hidden_sections = ("DFLOW__DATABASE__", "DFLOW__CELERY__")

    def is_hidden(name: str) -> bool:
        return (
            name.startswith(hidden_sections) or name in secret or (name.startswith("DFLOW__") and name.endswith("_CMD"))
        )

    resolved = {**env, **settings.as_env(), "DFLOW_HOME": str(settings.home)}
    return {
        **{name: value for name, value in resolved.items() if not is_hidden(name)},
        **{name: env.get(name, "1") for name in _THREAD_COUNTS},
        "PYTHONHASHSEED": "0",  # a DAG built by looping over a set has the same structure every time
        "PYTHONDONTWRITEBYTECODE": "1",  # the snapshot of a bundle stays what its hash says
    }


def _decode(path: str, reply: Mapping[str, Any]) -> Parsed:
    """Turn a host's reply into data; an answer that cannot be decoded is the file's failure."""
    specs: tuple[DagSpec, ...] = ()
    failure = Failure(message=f"{path}: {reply['failure']}") if reply["failure"] else None
    answer: Mapping[str, Any] = {}
    if failure is None:
        try:
            answer = json.loads(reply["answer"])
            if "failure" in answer:
                failure = Failure(**{key: _storable(text) for key, text in answer["failure"].items()})
            else:
                specs = tuple(serialization.from_json(dag) for dag in answer["dags"])
        except (DflowError, ValueError, KeyError, TypeError) as error:
            failure = Failure(message=_storable(f"{path}: what it defines cannot be stored: {error}"))
    return Parsed(
        path=path,
        specs=specs,
        failure=failure,
        touched=tuple(_storable(name) for name in (*answer.get("touched", ()), *answer.get("listed", ()))),
        output=_storable(reply["output"]),
        duration_seconds=reply["duration_seconds"],
        peak_rss_bytes=reply["peak_rss_bytes"],
    )


def _storable(text: str) -> str:
    """Return the text without what Postgres cannot hold: NUL characters and lone surrogates."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"

"""Runs the command of a ``_CMD`` setting and returns what it printed.

As in Airflow the command is split like a shell would (shlex) and run without a shell. Promises: it ends within
`TIMEOUT_SECONDS` together with everything it started, and no error shows its output, its arguments or its errors,
because each of them may hold the secret.
"""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Final

from dflow.settings.values import BadValueError

TIMEOUT_SECONDS: Final = 10.0
MAX_OUTPUT_BYTES: Final = 64 * 1024
# Set for the command, so that one which asks dflow for the very setting ends at once and not in a chain of processes.
IN_COMMAND_VARIABLE: Final = "DFLOW_IN_SETTING_COMMAND"


def program_of(command: str) -> str:
    """Return the first word of a command, the part that may be shown."""
    try:
        words = shlex.split(command)
    except ValueError:
        return "?"
    return words[0] if words else "?"


def output_of(command: str, env: Mapping[str, str]) -> str:
    """Run the command and return its standard output without the line break at its end, raising BadValueError."""
    if env.get(IN_COMMAND_VARIABLE):
        raise BadValueError("a command of a setting must not ask dflow for settings that come from commands")
    argv = _split(command)
    child_env = {**env, IN_COMMAND_VARIABLE: "1"}
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_env,
            start_new_session=True,  # so that what it starts can be ended with it
        )
    except OSError as error:
        raise BadValueError(f"the command {argv[0]!r} cannot be started: {error.strerror}") from None
    try:
        output = _read(process, argv[0])
    finally:
        _end(process)
    if process.returncode != 0:
        raise BadValueError(
            f"the command {argv[0]!r} {_ended(process.returncode)}; "
            "run it by hand to see why (what it printed is not shown)"
        )
    return _text(output, argv[0])


def _split(command: str) -> list[str]:
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise BadValueError(f"the command cannot be split into words: {str(error).lower()}") from None
    if not argv:
        raise BadValueError("the command is empty")
    return argv


def _read(process: subprocess.Popen[bytes], program: str) -> bytes:
    """Read to the end of the output and wait for the exit, both within the time limit."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    assert process.stdout is not None
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not selector.select(remaining):
                raise BadValueError(f"the command {program!r} took longer than {TIMEOUT_SECONDS:g} seconds")
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                break
            output += piece
            if len(output) > MAX_OUTPUT_BYTES:
                raise BadValueError(f"the command {program!r} printed more than {MAX_OUTPUT_BYTES} bytes")
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise BadValueError(f"the command {program!r} took longer than {TIMEOUT_SECONDS:g} seconds") from None
    return bytes(output)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _ended(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-returncode} ({name})"


def _text(output: bytes, program: str) -> str:
    try:
        text = output.decode()
    except UnicodeDecodeError:
        raise BadValueError(f"the command {program!r} printed something that is not UTF-8") from None
    text = text.rstrip("\r\n")
    if not text:
        raise BadValueError(f"the command {program!r} printed nothing")
    if "\n" in text:
        raise BadValueError(f"the command {program!r} printed more than one line")
    return text

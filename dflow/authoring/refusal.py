"""Refusing a mistake in a DAG file: errors that name the file and line of the user's code, and what to do instead.

The user's line is the innermost frame of the call stack that is neither in dflow nor in the interpreter's machinery.
The functions here return the error for the caller to raise, so that type checkers and readers see the control flow.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from dflow.core.errors import DagDefinitionError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_EXAMPLES = os.path.join(_PACKAGE, "examples") + os.sep  # DAG files that happen to live inside the package


@dataclass(frozen=True, slots=True)
class Location:
    """A line of the user's code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def is_user_file(filename: str) -> bool:
    """Tell the user's code from dflow's own and from frozen or generated code."""
    if filename.startswith("<"):
        return filename.startswith(("<stdin>", "<dag"))
    return not filename.startswith(_PACKAGE) or filename.startswith(_EXAMPLES)


def user_location() -> Location | None:
    """Return the innermost line of user code on the stack, or None when there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            return Location(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def module_location() -> Location | None:
    """Return the innermost user line that runs at the top level of a module: who is being imported."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and is_user_file(code.co_filename):
            return Location(code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def refusal(
    message: str, *, at: Location | None = None, kind: type[DagDefinitionError] = DagDefinitionError
) -> DagDefinitionError:
    """Return the error for ``message`` at ``at``, by default the user's line that is being executed."""
    where = at or user_location()
    return kind(message, file=where.file if where else None, line=where.line if where else None)


def not_supported(what: str, remedy: str = "", *, at: Location | None = None) -> DagDefinitionError:
    """Return the refusal of something Airflow has and dflow does not have (yet)."""
    return refusal(f"not supported yet: {what}" + (f"; {remedy}" if remedy else ""), at=at)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``', did you mean "x"?'`` for a near miss, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f', did you mean "{near[0]}"?' if near else ""


def unknown_arguments(
    owner: str, names: Iterable[str], known: Iterable[str], renamed: dict[str, str] | None = None
) -> DagDefinitionError:
    """Return the refusal of keyword arguments that ``owner`` does not take.

    ``renamed`` maps names of older Airflow versions to what to write today.
    """
    known = list(known)
    sentences = []
    for name in names:
        if renamed and name in renamed:
            sentences.append(f"{owner} takes no argument {name!r}: {renamed[name]}")
        else:
            sentences.append(f"{owner} takes no argument {name!r}{did_you_mean(name, known)}")
    return refusal("; ".join(sentences))

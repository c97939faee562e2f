"""Reads ``dflow.cfg``: INI without interpolation, so that a ``%`` in a password is a ``%``.

Promises line numbers for every problem, and never the text of a line: it may hold a secret.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """What the file says: ``{section: {key: text}}`` with lower-case keys, and the line of each."""

    path: Path
    exists: bool
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    lines: Mapping[tuple[str, str], int] = field(default_factory=dict)  # key "" is the section itself
    problems: tuple[str, ...] = ()


def read(path: Path, *, must_exist: bool) -> ConfigFile:
    """Read the file; what is wrong with it is in ``problems``."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        problem = f"{path}: there is no such file; DFLOW_CONFIG names it"
        return ConfigFile(path=path, exists=False, problems=(problem,) if must_exist else ())
    except UnicodeDecodeError:
        return ConfigFile(path=path, exists=True, problems=(f"{path}: the file is not UTF-8",))
    except OSError as error:
        return ConfigFile(path=path, exists=True, problems=(f"{path}: cannot be read: {error.strerror}",))
    parser = configparser.ConfigParser(interpolation=None, default_section="\0", strict=True)
    try:
        parser.read_string(text)
    except configparser.Error as error:
        return ConfigFile(path=path, exists=True, problems=tuple(f"{path}:{p}" for p in _syntax_problems(error)))
    values = {section: dict(parser[section]) for section in parser.sections()}
    return ConfigFile(path=path, exists=True, values=values, lines=_line_numbers(text))


def _syntax_problems(error: configparser.Error) -> list[str]:
    match error:
        case configparser.MissingSectionHeaderError():
            return [f"{error.lineno}: a [section] must come before the first setting"]
        case configparser.DuplicateSectionError():
            return [f"{error.lineno}: section [{error.section}] is there twice"]
        case configparser.DuplicateOptionError():
            return [f"{error.lineno}: {error.option} is there twice in section [{error.section}]"]
        case configparser.ParsingError():
            return [
                f"{line}: this line is neither `key = value` nor a [section] nor a # comment"
                for line, _ in error.errors
            ]
        case _:
            return [f" {type(error).__name__}"]


def _line_numbers(text: str) -> dict[tuple[str, str], int]:
    """Where sections and keys stand. Lines that begin with a space go on with the value before them."""
    found: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line[0] in "#; \t":
            continue
        if line.startswith("["):
            section = line[1:].partition("]")[0]
            found.setdefault((section, ""), number)
            continue
        key = re.split("[=:]", line, maxsplit=1)[0].strip().lower()
        found.setdefault((section, key), number)
    return found

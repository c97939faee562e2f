"""`.dflowignore`: which files of a DAG folder are not part of its bundle, in the syntax of `.gitignore`.

Each directory may have a `.dflowignore`; its patterns hold for that directory and everything below it. The rules are
those of gitignore(5): `#` comments, `!` takes a path back in, a trailing `/` matches directories only, a `/` at the
start or in the middle ties the pattern to the directory of the file, `*` and `?` stop at `/`, `**` does not, the last
matching pattern decides, and nothing below an ignored directory can be taken back in (it is not even looked at).

Pure: text in, answers out. Walking the folder is `dflow.services.bundle_scan`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

FILE_NAME = ".dflowignore"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of a `.dflowignore`. ``base`` is the directory of the file, relative to the bundle, "" for its root."""

    base: str
    regex: re.Pattern[str]
    is_negation: bool
    is_directory_only: bool

    def matches(self, path: str, *, is_directory: bool) -> bool:
        """Return whether the rule speaks about ``path`` (relative to the bundle, with /)."""
        if self.is_directory_only and not is_directory:
            return False
        prefix = self.base + "/" if self.base else ""
        return path.startswith(prefix) and self.regex.fullmatch(path, len(prefix)) is not None


def parse(text: str, *, base: str = "") -> tuple[Rule, ...]:
    """Read the lines of one `.dflowignore`; a line that is no valid pattern (an unclosed `[`) matches literally."""
    rules = (_rule(line, base) for line in text.splitlines())
    return tuple(rule for rule in rules if rule is not None)


def is_ignored(rules: Iterable[Rule], path: str, *, is_directory: bool) -> bool:
    """Return whether ``path`` is left out. ``rules`` go from the root downwards; the last one that matches decides."""
    ignored = False
    for rule in rules:
        if rule.is_negation == ignored and rule.matches(path, is_directory=is_directory):
            ignored = not rule.is_negation
    return ignored


def _rule(line: str, base: str) -> Rule | None:
    pattern = _strip_trailing_spaces(line)
    if not pattern or pattern.startswith("#"):
        return None
    is_negation = pattern.startswith("!")
    if is_negation:
        pattern = pattern[1:]
    is_directory_only = pattern.endswith("/")
    pattern = pattern.rstrip("/")
    if not pattern:
        return None
    is_anchored = "/" in pattern
    source = _translate(pattern.lstrip("/"))
    if not is_anchored:
        source = "(?:.*/)?" + source
    return Rule(
        base=base,
        regex=re.compile(source, re.DOTALL),
        is_negation=is_negation,
        is_directory_only=is_directory_only,
    )


def _strip_trailing_spaces(line: str) -> str:
    stripped = line.rstrip(" \t\r")
    if stripped.endswith("\\") and len(stripped) < len(line):
        return stripped + " "
    return stripped


def _translate(pattern: str) -> str:
    """Turn a glob into the source of a regular expression over a path with / separators."""
    parts = pattern.split("/")
    source = ""
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        if part == "**":
            # "a/**" is everything below a; "**/a" and "a/**/b" also match with nothing in between.
            source += ".+" if is_last else "(?:.*/)?"
        else:
            source += _translate_part(part) + ("" if is_last else "/")
    return source


def _translate_part(part: str) -> str:
    source, index = "", 0
    while index < len(part):
        char = part[index]
        index += 1
        if char == "*":
            source += "[^/]*"
        elif char == "?":
            source += "[^/]"
        elif char == "\\" and index < len(part):
            source += re.escape(part[index])
            index += 1
        elif char == "[":
            char_class, index = _translate_class(part, index)
            source += char_class
        else:
            source += re.escape(char)
    return source


def _translate_class(part: str, start: int) -> tuple[str, int]:
    """Translate "[...]" whose inside begins at ``start``; without a closing bracket the "[" is a plain character."""
    end = part.find("]", start + (2 if part[start : start + 1] in {"!", "^"} else 1))
    if end < 0:
        return re.escape("["), start
    inside = part[start:end]
    negation = "^" if inside[:1] in {"!", "^"} else ""
    inside = inside[1:] if negation else inside
    escaped = inside.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace("^", "\\^")
    try:
        re.compile(f"[{escaped}]")
    except re.error:
        return re.escape("[" + part[start : end + 1]), end + 1
    return f"(?!/)[{negation}{escaped}]", end + 1

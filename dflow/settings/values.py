"""From text to a typed value and back, and the redacted form that may be shown.

Promise: no message made here contains the text of a secret setting.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Final

from dflow.settings.schema import Setting

Value = str | int | float | bool | Path | None

REDACTED: Final = "***"
_TRUE: Final = frozenset({"true", "t", "1", "yes", "y", "on"})
_FALSE: Final = frozenset({"false", "f", "0", "no", "n", "off"})
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_USER: Final = re.compile(r"[^/?#]*")
_SECRET_IN_QUERY: Final = re.compile(r"([?&][a-z_]*(?:password|passwd|token)=)[^&]*", re.IGNORECASE)


class BadValueError(ValueError):
    """A text is not a value of the setting; the message says what was expected, ready to be shown."""


def parse(setting: Setting, text: str, home: Path) -> Value:
    """Return the typed value of a text, raising BadValueError. ``home`` replaces ``{home}`` in paths."""
    text = text.strip()
    if "\n" in text:
        raise BadValueError("the value spans several lines")
    if setting.is_optional and text.lower() in {"", "none"}:
        return None
    match setting.kind:
        case "str":
            return _parse_str(setting, text)
        case "bool":
            return _parse_bool(text)
        case "path":
            return _parse_path(text, home)
        case _:
            return _parse_number(setting, text)


def to_text(value: Value) -> str:
    """Return the text that `parse` reads back as this value."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer():
            return str(int(value))
        case _:
            return str(value)


def shown(setting: Setting, text: str) -> str:
    """Return the text as it may be shown: secrets as ``***``, of addresses only the password."""
    if not setting.is_secret or not text:
        return text
    return redact_url(text) if setting.is_url else REDACTED


def redact_url(url: str) -> str:
    """Return an address with its passwords, also those in its query, as ``***``; what is no URL becomes ``***``.

    Works on the raw text: a password with an unencoded ``/``, ``#``, ``?`` or ``@`` makes a wrong URL, and is still
    hidden.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        return REDACTED
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    if at and not _USER.fullmatch(user):
        credentials = REDACTED
    elif colon:
        credentials = f"{user}:{REDACTED}"
    place = _SECRET_IN_QUERY.sub(rf"\1{REDACTED}", place)
    return f"{scheme}://{credentials}{at}{place}"


def _parse_str(setting: Setting, text: str) -> str:
    if not setting.choices:
        return text
    by_folded = {choice.lower(): choice for choice in setting.choices}
    if text.lower() not in by_folded:
        raise BadValueError(f"{_quoted(text)} is none of {', '.join(setting.choices)}{_suggest(text, setting.choices)}")
    return by_folded[text.lower()]


def _parse_bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise BadValueError(f"{_quoted(text)} is neither true nor false")


def _parse_path(text: str, home: Path) -> Path:
    if not text:
        raise BadValueError("a path is expected, and it is empty")
    expanded = os.path.expanduser(text.replace("{home}", str(home)))
    return Path(os.path.normpath(home / expanded))


def _parse_number(setting: Setting, text: str) -> int | float:
    wanted = "a whole number" if setting.kind == "int" else "a number"
    unit = f" of {setting.unit}" if setting.unit else ""
    try:
        number: int | float = int(text) if setting.kind == "int" else float(text)
    except ValueError:
        raise BadValueError(f"{_quoted(text)} is not {wanted}{unit}") from None
    if not math.isfinite(number):
        raise BadValueError(f"{_quoted(text)} is not {wanted}{unit}")
    _check_range(setting, number)
    return number


def _check_range(setting: Setting, number: float) -> None:
    low, high = setting.minimum, setting.maximum
    if (low is None or number >= low) and (high is None or number <= high):
        return
    unit = f" {setting.unit}" if setting.unit else ""
    if low is not None and high is not None:
        expected = f"between {to_text(low)} and {to_text(high)}{unit}"
    else:
        expected = f"at least {to_text(low)}{unit}" if low is not None else f"at most {to_text(high)}{unit}"
    raise BadValueError(f"{to_text(number)} is out of range, it must be {expected}")


def _quoted(text: str) -> str:
    if not text:
        return "an empty value"
    note = " (a comment needs a line of its own)" if " #" in text or " ;" in text else ""
    return repr(text) + note


def _suggest(text: str, choices: tuple[str, ...]) -> str:
    from dflow.settings.suggest import did_you_mean

    return did_you_mean(text, choices)


def typed(value: Value) -> str | int | float | bool | None:
    """Return the value as JSON has it: paths as text."""
    return str(value) if isinstance(value, Path) else value

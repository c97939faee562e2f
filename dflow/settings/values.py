"""From text to a typed value and back, and the redacted form that may be shown.

Promise: no message made here contains the text of a secret setting.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit, urlunsplit

from dflow.settings.schema import Setting

Value = str | int | float | bool | Path | None

REDACTED: Final = "***"
_TRUE: Final = frozenset({"true", "t", "1", "yes", "y", "on"})
_FALSE: Final = frozenset({"false", "f", "0", "no", "n", "off"})
_SECRET_QUERY_KEYS: Final = frozenset(
    {"password", "passwd", "passfile", "sslpassword", "ssl_keyfile_password", "token"}
)


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
    """Return an address with its passwords, also those in its query, as ``***``; what is no URL becomes ``***``."""
    try:
        parts = urlsplit(url)
        if not parts.scheme or "://" not in url:
            return REDACTED
        return _redacted(parts)
    except ValueError:  # such as an unclosed bracket around an IPv6 address
        return REDACTED


def _redacted(parts: SplitResult) -> str:
    credentials, at, host = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    netloc = f"{user}:{REDACTED}{at}{host}" if colon else parts.netloc
    query = parse_qsl(parts.query, keep_blank_values=True)
    if any(key.lower() in _SECRET_QUERY_KEYS for key, _ in query):
        query = [(key, REDACTED if key.lower() in _SECRET_QUERY_KEYS else value) for key, value in query]
        parts = parts._replace(query=urlencode(query, safe="*/", quote_via=quote))
    redacted = urlunsplit(parts._replace(netloc=netloc))
    # urlunsplit drops an empty authority that the schemes of sockets need: redis+socket:///path
    return redacted if "://" in redacted else redacted.replace(":", "://", 1)


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

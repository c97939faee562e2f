"""Values that tasks pass to each other, as JSON and back.

JSON's own values go through as they are. A few types of the standard library are written as ``{"__type__": name,
"value": ...}`` and come back as what they were. The registry below is closed: decoding looks the name up in it and
never imports or calls anything that stored data names. Numbers and strings that jsonb in Postgres would alter or refuse
(NaN, infinities, -0.0, floats it prints as integers, NUL characters, lone surrogates) are tagged too, so that what one
task returned is what the next one gets.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta, tzinfo
from decimal import Decimal
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

TAG: Final = "__type__"
_VALUE: Final = "value"
_MAX_DEPTH: Final = 100
_EXACT_FLOAT: Final = 1e16  # from here on repr() has an exponent and jsonb gives back an integer


def encode(value: Any, what: str) -> Any:
    """Return ``value`` as JSON data.

    ``what`` names it in errors, e.g. "the result of task 'load'". Raises TypeError for a type outside the registry,
    ValueError for a value nested deeper than 100 levels (or inside itself).
    """
    return _encode(value, what, "", 0)


def decode(data: Any) -> Any:
    """Return the value that `encode` was given. Raises ValueError for a tag that is not in the registry."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if TAG not in data:
        return {key: decode(item) for key, item in data.items()}
    decoder = _DECODERS.get(data[TAG]) if isinstance(data[TAG], str) else None
    if decoder is None:
        raise ValueError(
            f"a stored XCom has the unknown type {data[TAG]!r}; it was written by a newer dflow, upgrade this worker"
        )
    return decoder(data[_VALUE])


def check_size(data: Any, limit: int, what: str) -> None:
    """Raise ValueError when the JSON data takes more than ``limit`` bytes (``core.xcom_max_bytes``)."""
    if data is None or isinstance(data, bool | int | float) or (isinstance(data, str) and len(data) * 6 < limit):
        return
    size = len(json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode())
    if size > limit:
        raise ValueError(
            f"{what} takes {size:,} bytes as an XCom, more than core.xcom_max_bytes = {limit:,}; write it to a file or "
            "an object store and return its path"
        )


def _encode(value: Any, what: str, path: str, depth: int) -> Any:
    if value is None or value is True or value is False:
        return value
    if depth > _MAX_DEPTH:
        raise ValueError(f"{what} is nested over {_MAX_DEPTH} levels deep, or in itself; return something flatter")
    encoder = _ENCODERS.get(type(value)) or next(
        (encoder for kind, encoder in _ENCODERS.items() if isinstance(value, kind)), None
    )
    if encoder is None:
        raise TypeError(_refusal(value, what, path))
    return encoder(value, what, path, depth)


def _refusal(value: Any, what: str, path: str) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "__dataclass_fields__"):
        remedy = "return dataclasses.asdict(it)"
    elif hasattr(value, "model_dump"):
        remedy = "return it.model_dump(mode='json')"
    elif hasattr(value, "to_dict"):
        remedy = "return it.to_dict(), or write it to a file and return the path"
    elif hasattr(value, "tolist"):
        remedy = "return it.tolist()"
    elif hasattr(value, "__next__"):
        remedy = "return list(it)"
    else:
        remedy = "write it to a file and return the path, or use @task(do_xcom_push=False) if nobody needs it"
    where = f" at {path}" if path else ""
    return (
        f"{what} cannot be kept: {kind}{where} is none of JSON's types, datetime, date, time, timedelta, tuple, set, "
        f"bytes, Decimal, UUID and Path; {remedy}"
    )


def _tagged(name: str, value: Any) -> dict[str, Any]:
    return {TAG: name, _VALUE: value}


def _str(value: str, what: str, path: str, depth: int) -> Any:
    if "\x00" not in value:
        if value.isascii():
            return str(value)
        try:
            value.encode()
            return str(value)
        except UnicodeEncodeError:
            pass
    return _tagged("str", base64.b64encode(value.encode("utf-8", "surrogatepass")).decode())


def _float(value: float, what: str, path: str, depth: int) -> Any:
    is_plain = abs(value) < _EXACT_FLOAT and (value != 0 or math.copysign(1, value) > 0)  # False for NaN
    return float(value) if is_plain else _tagged("float", repr(float(value)))


def _dict(value: Mapping[Any, Any], what: str, path: str, depth: int) -> Any:
    if TAG not in value and all(isinstance(key, str) and _str(key, "", "", 0) == key for key in value):
        return {str(key): _encode(item, what, f"{path}[{key!r}]", depth + 1) for key, item in value.items()}
    pairs = [
        [_encode(key, what, f"{path} (key)", depth + 1), _encode(item, what, f"{path}[{key!r}]", depth + 1)]
        for key, item in value.items()
    ]
    return _tagged("dict", pairs)


def _items(value: Any, what: str, path: str, depth: int) -> list[Any]:
    return [_encode(item, what, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]


def _set(name: str) -> Callable[[Any, str, str, int], Any]:
    def encode_set(value: Any, what: str, path: str, depth: int) -> Any:
        try:
            members = sorted(value)  # the same set, the same JSON
        except TypeError:
            members = list(value)
        return _tagged(name, _items(members, what, path, depth))

    return encode_set


def _datetime(value: datetime, what: str, path: str, depth: int) -> Any:
    data: dict[str, Any] = {"iso": value.isoformat()}
    if value.tzinfo is not None and (zone := _zone_key(value.tzinfo)):
        data["zone"] = zone
        data["fold"] = value.fold
    return _tagged("datetime", data)


def _zone_key(zone: tzinfo) -> str | None:
    key = getattr(zone, "key", None) or getattr(zone, "zone", None)
    return key if isinstance(key, str) else None


def _to_datetime(data: Any) -> datetime:
    moment = datetime.fromisoformat(data["iso"])
    if "zone" not in data:
        return moment
    return moment.replace(tzinfo=ZoneInfo(data["zone"]), fold=data["fold"])


_ENCODERS: Final[dict[type, Callable[[Any, str, str, int], Any]]] = {
    str: _str,
    int: lambda value, *_: int(value),
    float: _float,
    dict: _dict,
    list: _items,
    tuple: lambda value, *where: _tagged("tuple", _items(value, *where)),
    set: _set("set"),
    frozenset: _set("frozenset"),
    bytes: lambda value, *_: _tagged("bytes", base64.b64encode(value).decode()),
    datetime: _datetime,  # before date, which it is a subclass of
    date: lambda value, *_: _tagged("date", value.isoformat()),
    time: lambda value, *_: _tagged("time", value.isoformat()),
    timedelta: lambda value, *_: _tagged("timedelta", [value.days, value.seconds, value.microseconds]),
    Decimal: lambda value, *_: _tagged("decimal", str(value)),
    UUID: lambda value, *_: _tagged("uuid", str(value)),
    PurePath: lambda value, *_: _tagged("path", str(value)),
}
_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "str": lambda data: base64.b64decode(data).decode("utf-8", "surrogatepass"),
    "float": float,
    "dict": lambda data: {_hashable(decode(key)): decode(item) for key, item in data},
    "tuple": lambda data: tuple(decode(item) for item in data),
    "set": lambda data: {decode(item) for item in data},
    "frozenset": lambda data: frozenset(decode(item) for item in data),
    "bytes": base64.b64decode,
    "datetime": _to_datetime,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "timedelta": lambda data: timedelta(days=data[0], seconds=data[1], microseconds=data[2]),
    "decimal": Decimal,
    "uuid": UUID,
    "path": lambda data: Path(PurePosixPath(data)),
}


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key

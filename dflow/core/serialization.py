"""The canonical JSON form of a DAG, and the hash of its structure.

One generic walk over the dataclass fields of `dflow.core.spec` does it all, in both directions, so a new field needs
nothing here (only its line in ``dag_schema.json``, which a test demands). What it promises:

- Every field is written, defaults too; `from_json` gives back an equal spec.
- Equal specs have equal text and hash: keys are sorted, floats have one form, instants are ISO 8601 in UTC (+00:00).
  The text also survives a `jsonb` column: `structure_hash(from_json(stored))` is the hash that was stored.
- `from_json` refuses what it does not know: another schema version, a key no field has, a value of another type. A key
  that is absent takes the field's default: a document written before the field existed. Adding a field therefore keeps
  SCHEMA_VERSION; changing what one means raises it.
- Data only: what has no JSON form (a set, a NaN, a naive datetime, a NUL character) is a SerializationError with its
  place. Tuples inside ``params`` become lists.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from math import isfinite
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from dflow.core.errors import SerializationError
from dflow.core.spec import DagSpec

SCHEMA_VERSION: Final = 1
_VERSION_KEY: Final = "schema_version"
_LARGE: Final = 1e16  # from here on repr() of a float has an exponent, and jsonb would give an integer back


def to_json(spec: DagSpec) -> dict[str, Any]:
    """Return the spec as plain JSON data: its fields, and ``schema_version``. Raises SerializationError."""
    return {_VERSION_KEY: SCHEMA_VERSION, **_codec(DagSpec).encode(spec, spec.dag_id or "dag")}


def from_json(data: Mapping[str, Any]) -> DagSpec:
    """Return the spec that `to_json` made the data from. Raises SerializationError, naming the place."""
    if not isinstance(data, Mapping):
        raise SerializationError(f"a serialized DAG is a JSON object, not {_kind(data)}; serialize the DAG again")
    version = data.get(_VERSION_KEY)
    if type(version) is not int or version != SCHEMA_VERSION:
        raise SerializationError(
            f"serialized DAG {data.get('dag_id', '?')!r} has schema version {version!r}, this dflow reads "
            f"{SCHEMA_VERSION}; let the dag-processor of this version parse the file again, or upgrade dflow"
        )
    rest = {key: value for key, value in data.items() if key != _VERSION_KEY}
    spec = _codec(DagSpec).decode(rest, str(data.get("dag_id", "dag")))
    assert isinstance(spec, DagSpec)
    return spec


def canonical(data: Any) -> str:
    """Return JSON text that is the same for the same data: sorted keys, no spaces, no NaN, UTF-8 unescaped."""
    try:
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SerializationError(f"no canonical JSON: {error}; use JSON values only") from None


def structure_hash(spec: DagSpec) -> str:
    """Return the sha256 (hex) of the spec's canonical JSON."""
    return sha256(canonical(to_json(spec)).encode()).hexdigest()


class _Codec:
    """How values of one type become JSON and come back. ``where`` is the path of the value, for error messages."""

    __slots__ = ("decode", "encode")

    def __init__(self, encode: Callable[[Any, str], Any], decode: Callable[[Any, str], Any]) -> None:
        self.encode, self.decode = encode, decode


@cache
def _codec(hint: Any) -> _Codec:
    """Return the codec of a field's type. Knows the types specs are made of; another one is an error in the spec."""
    if is_dataclass(hint) and isinstance(hint, type):
        return _record_codec(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and len(arguments) == 2 and types.NoneType in arguments:
        return _optional_codec(_codec(next(argument for argument in arguments if argument is not types.NoneType)))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple_codec(_codec(arguments[0]))
    if origin is Mapping and arguments[0] is str:
        return _mapping_codec(_codec(arguments[1]))
    raise TypeError(f"specs cannot have fields of type {hint}; teach dflow.core.serialization about it")


def _record_codec(record: type) -> _Codec:
    hints = get_type_hints(record)
    known = {field.name: (field, _codec(hints[field.name])) for field in fields(record)}

    def encode(value: Any, where: str) -> dict[str, Any]:
        _expect(type(value) is record, value, where, record.__name__)
        return {name: codec.encode(getattr(value, name), f"{where}.{name}") for name, (_, codec) in known.items()}

    def decode(data: Any, where: str) -> Any:
        _expect(isinstance(data, Mapping), data, where, "an object")
        for key in data:
            if key not in known:
                raise SerializationError(
                    f"{where}: unknown key {key!r}; the DAG was serialized by a newer dflow, upgrade this one"
                )
        for name, (field, _) in known.items():
            if name not in data and not _has_default(field):
                raise SerializationError(
                    f"{where}: key {name!r} is missing; let the dag-processor parse the file again"
                )
        return record(**{name: known[name][1].decode(value, f"{where}.{name}") for name, value in data.items()})

    return _Codec(encode, decode)


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _optional_codec(inner: _Codec) -> _Codec:
    return _Codec(
        lambda value, where: None if value is None else inner.encode(value, where),
        lambda data, where: None if data is None else inner.decode(data, where),
    )


def _tuple_codec(inner: _Codec) -> _Codec:
    def encode(value: Any, where: str) -> list[Any]:
        _expect(isinstance(value, tuple), value, where, "a tuple")
        return [inner.encode(item, f"{where}[{place}]") for place, item in enumerate(value)]

    def decode(data: Any, where: str) -> tuple[Any, ...]:
        _expect(isinstance(data, list), data, where, "a list")
        return tuple(inner.decode(item, f"{where}[{place}]") for place, item in enumerate(data))

    return _Codec(encode, decode)


def _mapping_codec(inner: _Codec) -> _Codec:
    def walk(step: Callable[[Any, str], Any], value: Any, where: str) -> dict[str, Any]:
        _expect(isinstance(value, Mapping), value, where, "a mapping")
        return {_text(key, f"{where} (a key)"): step(item, f"{where}.{key}") for key, item in value.items()}

    return _Codec(
        lambda value, where: walk(inner.encode, value, where), lambda data, where: walk(inner.decode, data, where)
    )


def _text(value: Any, where: str) -> str:
    _expect(isinstance(value, str), value, where, "a string")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise SerializationError(
            f"{where}: {value!r} has a NUL or a lone surrogate, which JSON in Postgres cannot hold"
        )
    return str.__str__(value)


def _integer(value: Any, where: str) -> int:
    _expect(isinstance(value, int) and not isinstance(value, bool), value, where, "an integer")
    return int(value)


def _boolean(value: Any, where: str) -> bool:
    _expect(isinstance(value, bool), value, where, "true or false")
    return bool(value)


def _float(value: Any, where: str) -> float:
    _expect(isinstance(value, int | float) and not isinstance(value, bool), value, where, "a number")
    try:
        number = float(value)
    except OverflowError:
        raise SerializationError(f"{where}: {value!r} is too large for a float") from None
    if not isfinite(number):
        raise SerializationError(f"{where}: {value!r} has no JSON form; use a finite number or None")
    return number + 0.0  # -0.0 becomes 0.0, which is what jsonb keeps


def _written_float(value: Any, where: str) -> float | int:
    """Return a float such that its JSON text reads back alike from jsonb, whose numbers have no exponent."""
    number = _float(value, where)
    return int(number) if abs(number) >= _LARGE else number


def _instant_out(value: Any, where: str) -> str:
    _expect(isinstance(value, datetime), value, where, "a datetime")
    if value.utcoffset() is None:
        raise SerializationError(f"{where}: {value.isoformat()} has no time zone; give the datetime a tzinfo")
    try:
        return str(value.astimezone(UTC).isoformat())
    except OverflowError:
        raise SerializationError(f"{where}: {value.isoformat()} does not exist in UTC; use a later year") from None


def _instant_in(data: Any, where: str) -> datetime:
    try:
        instant = datetime.fromisoformat(_text(data, where))
    except ValueError:
        raise SerializationError(f"{where}: {data!r} is not an ISO 8601 instant") from None
    if instant.utcoffset() is None:
        raise SerializationError(f"{where}: {data!r} has no offset; instants are written in UTC")
    return instant.astimezone(UTC)


def _plain(value: Any, where: str) -> Any:
    """Return any JSON value in its one form; the way in and the way out are the same."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _written_float(value, where)
    if isinstance(value, Mapping):
        return {_text(key, f"{where} (a key)"): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
    raise SerializationError(
        f"{where}: {_kind(value)} has no JSON form; use strings, numbers, booleans, lists and dicts"
    )


_SCALARS: Final[dict[Any, _Codec]] = {
    str: _Codec(_text, _text),
    int: _Codec(_integer, _integer),
    bool: _Codec(_boolean, _boolean),
    float: _Codec(_written_float, _float),
    datetime: _Codec(_instant_out, _instant_in),
    Any: _Codec(_plain, _plain),
}


def _expect(holds: bool, value: Any, where: str, wanted: str) -> None:
    if not holds:
        raise SerializationError(f"{where}: expected {wanted}, got {_kind(value)}")


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.80}"

"""Params: named inputs of a DAG or task, with a default, a description and a JSON Schema that values must meet.

`resolve` works on the serialized form, so that a trigger (CLI, API) validates ``conf`` exactly as the task will,
without importing user code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from datetime import datetime, time
from typing import TYPE_CHECKING, Any, Final

from dflow.authoring.exceptions import ParamValidationError
from dflow.authoring.refusal import refusal
from dflow.authoring.resolvable import Resolvable

if TYPE_CHECKING:
    import jsonschema

    from dflow.authoring.context import Context


class _Unset:
    def __repr__(self) -> str:
        return "<no default>"


UNSET: Final = _Unset()


class Param:
    """One input: ``Param(10, type="integer", minimum=1, description="rows per batch")``.

    Parameters:
        default: the value when a run gives none; left out, every run must give one.
        description: for people.
        source: where it was declared, "dag" or "task"; kept for compatibility.
        schema: a JSON Schema (draft 2020-12); keyword arguments are added to it.
    """

    __slots__ = ("_value", "description", "schema", "source")

    def __init__(
        self,
        default: Any = UNSET,
        description: str | None = None,
        source: str | None = None,
        schema: Mapping[str, Any] | None = None,
        **json_schema: Any,
    ) -> None:
        if default is not UNSET:
            _must_be_json(default, "the default of a Param")
        merged = {**(schema or {}), **json_schema}
        if "description" in merged and description is None:
            description = merged.pop("description")
        _must_be_json(merged, "the schema of a Param")
        self._value = default
        self.description = description
        self.source = source
        self.schema: dict[str, Any] = merged

    @property
    def has_value(self) -> bool:
        """Whether there is a default."""
        return self._value is not UNSET

    @property
    def value(self) -> Any:
        """The default, or None without one."""
        return None if self._value is UNSET else self._value

    def resolve(self, value: Any = UNSET, *, name: str = "") -> Any:
        """Return ``value``, or the default; raises `ParamValidationError` when the schema forbids it."""
        chosen = self._value if value is UNSET else value
        return validate(name, chosen, self.schema)

    def dump(self) -> dict[str, Any]:
        """Return the serialized form; ``value`` is left out when there is no default."""
        data: dict[str, Any] = {"description": self.description, "schema": dict(self.schema)}
        if self.has_value:
            data["value"] = self._value
        return data

    def __repr__(self) -> str:
        return f"Param({self._value!r}{''.join(f', {key}={value!r}' for key, value in self.schema.items())})"


class ParamsDict(MutableMapping[str, Any]):
    """Params by name. ``params["x"]`` is the value; `get_param` the `Param` with its schema."""

    __slots__ = ("_params", "_what")

    def __init__(self, data: Mapping[str, Any] | None = None, *, what: str = "params") -> None:
        if data is not None and not isinstance(data, Mapping):
            raise refusal(f"{what} must be a dict of names to values, not {type(data).__name__}")
        self._what = what
        self._params: dict[str, Param] = {}
        source = data._params if isinstance(data, ParamsDict) else (data or {})
        for name, value in source.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise refusal(f"{self._what} must have strings as names, not {name!r}")
        if isinstance(value, Param):
            self._params[name] = value
            return
        _must_be_json(value, f"{self._what}: {name!r}")
        old = self._params.get(name)
        self._params[name] = Param(value, old.description, old.source, old.schema) if old else Param(value)

    def __getitem__(self, name: str) -> Any:
        return self._params[name].value

    def get_param(self, name: str) -> Param:
        """Return the Param itself."""
        return self._params[name]

    def __delitem__(self, name: str) -> None:
        del self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def dump(self) -> dict[str, Any]:
        """Return the serialized form: name to ``{"value", "description", "schema"}``."""
        return {name: param.dump() for name, param in self._params.items()}

    def validate(self) -> dict[str, Any]:
        """Return the values; raises `ParamValidationError` for the first that its schema forbids."""
        return {name: param.resolve(name=name) for name, param in self._params.items()}

    def __repr__(self) -> str:
        return repr(self._params)


class DagParam(Resolvable):
    """A DAG's param as a value for operators: what the arguments of a ``@dag`` function are inside it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def resolve(self, context: Context) -> Any:
        """Return the value in this run."""
        return context["params"][self.name]

    def __str__(self) -> str:
        return f"{{{{ params[{self.name!r}] }}}}"

    def __repr__(self) -> str:
        return f"DagParam({self.name!r})"

    def __iter__(self) -> Iterator[Any]:
        raise refusal(
            f"the value of the DAG argument {self.name!r} is not known while the file is parsed; use it inside a task"
        )


def resolve(specs: Mapping[str, Mapping[str, Any]], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values of serialized params in a run that was given ``overrides`` (its conf).

    Names in ``overrides`` that are not params are added as they are (Airflow's rule: conf is visible in ``params``).
    Raises `ParamValidationError` naming the param, the value and what its schema asks for.
    """
    overrides = overrides or {}
    values = {
        name: validate(name, overrides.get(name, spec.get("value", UNSET)), spec.get("schema") or {})
        for name, spec in specs.items()
    }
    for name, value in overrides.items():
        values.setdefault(name, value)
    return values


def validate(name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """Return ``value`` if ``schema`` allows it, else raise `ParamValidationError`."""
    if value is UNSET:
        raise ParamValidationError(f"param {name!r} has no default and no value was given; pass it in the run's conf")
    if not schema:
        return value
    check_schema(name, schema)
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema, format_checker=_format_checker())
    for problem in validator.iter_errors(value):
        raise ParamValidationError(
            f"param {name!r} has the value {value!r}, which its schema does not allow: {problem.message}"
        )
    return value


def check_schema(name: str, schema: Mapping[str, Any]) -> None:
    """Raise `ParamValidationError` unless ``schema`` is a JSON Schema."""
    if not schema:
        return
    import jsonschema  # 100 ms to import, and few DAGs have schemas

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ParamValidationError(
            f"the schema of param {name!r} is not a valid JSON Schema: {error.message}"
        ) from None


@functools.cache
def _format_checker() -> jsonschema.FormatChecker:
    """Return a checker that knows date-time and time too, which jsonschema leaves to other packages."""
    import jsonschema

    checker = jsonschema.FormatChecker()
    checker.checks("date-time", raises=ValueError)(_is_text_or(datetime.fromisoformat))
    checker.checks("time", raises=ValueError)(_is_text_or(time.fromisoformat))
    return checker


def _is_text_or(parse: Callable[[str], object]) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, str) or bool(parse(value)) or True


def _must_be_json(value: Any, what: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise refusal(
            f"{what} is not JSON ({error}); use strings, numbers, booleans, None, lists and dicts "
            "(an instant as a string with format='date-time')"
        ) from error

"""Params: defaults, schemas, and how a run's conf goes over them."""

from __future__ import annotations

import pytest

from dflow import Param, ParamsDict, ParamValidationError
from dflow.authoring.param import resolve
from dflow.core.errors import DagDefinitionError


def specs(**params: object) -> dict[str, dict[str, object]]:
    return ParamsDict(params).dump()


def test_conf_goes_over_defaults_and_adds_names() -> None:
    assert resolve(specs(a=1, b=Param(2, type="integer")), {"b": 3, "c": 4}) == {"a": 1, "b": 3, "c": 4}
    assert resolve(specs(a=1)) == {"a": 1}


@pytest.mark.parametrize(
    ("param", "value", "message"),
    [
        (Param(1, type="integer", minimum=1), 0, "less than the minimum"),
        (Param("a", enum=["a", "b"]), "c", "is not one of"),
        (Param("2026-01-01", format="date", type="string"), "yesterday", "is not a 'date'"),
        (Param("2026-01-01T00:00:00Z", format="date-time", type="string"), "now", "is not a 'date-time'"),
        (Param("10:00:00", format="time", type="string"), "25 o'clock", "is not a 'time'"),
    ],
)
def test_schemas_are_kept(param: Param, value: object, message: str) -> None:
    assert resolve(specs(p=param)) == {"p": param.value}
    with pytest.raises(ParamValidationError, match=message):
        resolve(specs(p=param), {"p": value})


def test_param_without_default_must_be_given() -> None:
    with pytest.raises(ParamValidationError, match="no default and no value"):
        resolve(specs(p=Param(type="string")))
    assert resolve(specs(p=Param(type="string")), {"p": "x"}) == {"p": "x"}


def test_params_dict_reads_values_and_keeps_schemas() -> None:
    params = ParamsDict({"a": Param(1, "why", type="integer"), "b": "x"})
    assert dict(params) == {"a": 1, "b": "x"}
    params["a"] = 2
    assert params.get_param("a").schema == {"type": "integer"}
    assert params.dump()["a"] == {"value": 2, "description": "why", "schema": {"type": "integer"}}
    assert dict(ParamsDict(params)) == {"a": 2, "b": "x"}


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(DagDefinitionError, match="is not JSON"):
        Param(float("nan"))
    with pytest.raises(DagDefinitionError, match="strings as names"):
        ParamsDict({1: 2})  # type: ignore[dict-item]

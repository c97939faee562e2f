"""Every spec survives JSON, and jsonb, and validates against the schema in the repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from decimal import Decimal
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflow.core.serialization import canonical, from_json, structure_hash, to_json
from dflow.core.spec import DagSpec, GroupSpec, ScheduleSpec, TaskSpec
from tests.property.strategies import JSON, SPECS

SCHEMA = json.loads((files("dflow.core") / "dag_schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def jsonb(value: Any) -> str:
    """Write JSON as a jsonb column gives it back: keys in another order, numbers as numeric prints them."""
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: (len(item[0]), item[0]))
        return "{" + ", ".join(f"{json.dumps(key)}: {jsonb(item)}" for key, item in items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(jsonb, value)) + "]"
    return format(value, "f") if isinstance(value, Decimal) else json.dumps(value)


def through_jsonb(text: str) -> Any:
    return json.loads(jsonb(json.loads(text, parse_float=Decimal)))


@settings(max_examples=120, deadline=None)
@given(spec=SPECS)
def test_round_trip_and_schema(spec: DagSpec) -> None:
    document = to_json(spec)
    VALIDATOR.validate(document)
    text = canonical(document)
    assert from_json(json.loads(text)) == spec
    stored = from_json(through_jsonb(text))
    assert stored == spec
    assert structure_hash(stored) == structure_hash(spec)


@settings(max_examples=60, deadline=None)
@given(params=st.dictionaries(st.text("abc", max_size=3), JSON, min_size=2, max_size=4), data=st.data())
def test_the_order_of_keys_does_not_matter(params: dict[str, Any], data: st.DataObject) -> None:
    shuffled = dict(data.draw(st.permutations(list(params.items()))))
    assert structure_hash(DagSpec(dag_id="d", params=params)) == structure_hash(DagSpec(dag_id="d", params=shuffled))


@settings(max_examples=60, deadline=None)
@given(spec=SPECS, data=st.data())
def test_every_field_counts_in_the_hash(spec: DagSpec, data: st.DataObject) -> None:
    other = data.draw(SPECS)
    name = data.draw(st.sampled_from([field.name for field in fields(DagSpec)]))
    changed = replace(spec, **{name: getattr(other, name)})
    same = canonical(to_json(changed)) == canonical(to_json(spec))
    assert (structure_hash(changed) == structure_hash(spec)) == same
    assert same == (to_json(changed)[name] == to_json(spec)[name])


@pytest.mark.parametrize(
    ("record", "part"),
    [
        (DagSpec, SCHEMA),
        (TaskSpec, SCHEMA["$defs"]["task"]),
        (GroupSpec, SCHEMA["$defs"]["group"]),
        (ScheduleSpec, SCHEMA["$defs"]["schedule"]),
    ],
)
def test_the_schema_has_exactly_the_fields(record: type, part: dict[str, Any]) -> None:
    names = {field.name for field in fields(record)} | ({"schema_version"} if record is DagSpec else set())
    assert set(part["properties"]) == names
    assert set(part["required"]) == names
    assert part["additionalProperties"] is False
    VALIDATOR.check_schema(SCHEMA)

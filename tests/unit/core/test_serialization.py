"""What the serialized form looks like, and what it refuses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from dflow.core.errors import SerializationError
from dflow.core.serialization import SCHEMA_VERSION, canonical, from_json, structure_hash, to_json
from dflow.core.spec import DagSpec, TaskSpec

SPEC = DagSpec(
    dag_id="d",
    tasks=(TaskSpec(task_id="a", operator="BashOperator"), TaskSpec(task_id="b", operator="X", upstream=("a",))),
    start_date=datetime(2026, 1, 2, tzinfo=UTC),
    params={"p": {"value": 1, "description": None, "schema": {}}},
)


def test_the_document_has_its_version_and_every_default() -> None:
    document = to_json(SPEC)
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["tasks"][0]["retry_delay_seconds"] == 300.0
    assert document["start_date"] == "2026-01-02T00:00:00+00:00"
    assert document["end_date"] is None


def test_one_instant_has_one_form() -> None:
    east = datetime(2026, 1, 2, 5, 30, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert structure_hash(DagSpec(dag_id="d", start_date=east)) == structure_hash(
        DagSpec(dag_id="d", start_date=datetime(2026, 1, 2, tzinfo=UTC))
    )


def test_one_number_has_one_form() -> None:
    def spec(delay: Any) -> DagSpec:
        return DagSpec(dag_id="d", tasks=(TaskSpec(task_id="a", operator="X", retry_delay_seconds=delay),))

    assert structure_hash(spec(300)) == structure_hash(spec(300.0))
    assert structure_hash(spec(-0.0)) == structure_hash(spec(0.0))


def test_tuples_in_params_become_lists() -> None:
    assert to_json(DagSpec(dag_id="d", params={"p": (1, (2,))}))["params"] == {"p": [1, [2]]}


def test_a_document_from_before_a_field_existed_takes_the_default() -> None:
    document = to_json(SPEC)
    del document["fail_fast"]
    del document["tasks"][0]["queue"]
    assert from_json(document) == SPEC


@pytest.mark.parametrize("version", [None, 0, 2, "1", True, 1.0])
def test_unknown_schema_versions_are_refused(version: Any) -> None:
    with pytest.raises(SerializationError, match="schema version"):
        from_json({**to_json(SPEC), "schema_version": version})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, r"d: unknown key 'colour'"),
        ({"catchup": 1}, r"d\.catchup: expected true or false, got int 1"),
        ({"max_active_runs": True}, r"d\.max_active_runs: expected an integer"),
        ({"max_active_runs": 1.0}, r"d\.max_active_runs: expected an integer"),
        ({"tags": "abc"}, r"d\.tags: expected a list"),
        ({"tags": [1]}, r"d\.tags\[0\]: expected a string"),
        ({"schedule": None}, r"d\.schedule: expected an object"),
        ({"dagrun_timeout_seconds": "1"}, r"d\.dagrun_timeout_seconds: expected a number"),
        ({"start_date": "yesterday"}, r"d\.start_date: 'yesterday' is not an ISO 8601 instant"),
        ({"start_date": "2026-01-01T00:00:00"}, r"d\.start_date: .* has no offset"),
        ({"tasks": [{"task_id": "a"}]}, r"d\.tasks\[0\]: key 'operator' is missing"),
        ({"owner_links": {"x": 1}}, r"d\.owner_links\.x: expected a string"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SerializationError, match=message):
        from_json({**to_json(SPEC), **change})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"p": {1, 2}}, r"d\.params\.p: set .* has no JSON form"),
        ({"p": float("nan")}, r"d\.params\.p: nan has no JSON form"),
        ({"p": [float("inf")]}, r"d\.params\.p\[0\]: inf"),
        ({"p": "a\0b"}, r"d\.params\.p: .* NUL"),
        ({"p": "\ud800"}, r"d\.params\.p: .* surrogate"),
        ({"p": datetime(2026, 1, 1, tzinfo=UTC)}, r"d\.params\.p: datetime"),
        ({"p": {3: 1}}, r"d\.params\.p \(a key\): expected a string"),
        ({"p": object()}, r"d\.params\.p: object"),
    ],
)
def test_values_without_json_form_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(SerializationError, match=message):
        to_json(DagSpec(dag_id="d", params=params))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (datetime(2026, 1, 1), "no time zone"),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))), "does not exist in UTC"),
    ],
)
def test_instants_that_are_none_are_refused(start: datetime, message: str) -> None:
    with pytest.raises(SerializationError, match=message):
        to_json(DagSpec(dag_id="d", start_date=start))


def test_a_value_of_the_wrong_type_in_a_spec_is_refused() -> None:
    with pytest.raises(SerializationError, match=r"d\.tasks: expected a tuple"):
        to_json(DagSpec(dag_id="d", tasks=[]))  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match=r"too large"):
        to_json(DagSpec(dag_id="d", dagrun_timeout_seconds=10**400))


def test_not_an_object() -> None:
    with pytest.raises(SerializationError, match="a JSON object"):
        from_json([])  # type: ignore[arg-type]


def test_canonical_text() -> None:
    assert canonical({"b": [1, 2.5], "a": "ü"}) == '{"a":"ü","b":[1,2.5]}'
    for bad in (float("nan"), {1, 2}, object()):
        with pytest.raises(SerializationError):
            canonical({"x": bad})

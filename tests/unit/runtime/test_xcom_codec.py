"""What tasks pass to each other comes back as it was, and what cannot be kept is refused with a remedy."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import OrderedDict, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflow.runtime import xcom_codec

PARIS = ZoneInfo("Europe/Paris")

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters())
    | st.binary() | st.decimals(allow_nan=False) | st.uuids() | st.dates() | st.timedeltas() | st.datetimes()
    | st.datetimes(timezones=st.sampled_from([UTC, PARIS, timezone(timedelta(hours=5, minutes=30))]))
    | st.builds(Path, st.sampled_from(["a", "/b/c"]))
)  # fmt: skip
keys = st.text(max_size=5) | st.integers() | st.tuples(st.integers(), st.text(max_size=2)) | st.just("__type__")
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
        | st.sets(st.integers() | st.text(max_size=3), max_size=4) | st.frozensets(st.dates(), max_size=3)
    ),
    max_leaves=12,
)  # fmt: skip


@given(values)
def test_round_trip_through_json(value: Any) -> None:
    data = json.loads(json.dumps(xcom_codec.encode(value, "x"), allow_nan=False))
    assert xcom_codec.decode(data) == value
    assert type(xcom_codec.decode(data)) is type(value)


@given(values)
def test_data_holds_nothing_jsonb_refuses_or_alters(value: Any) -> None:
    text = json.dumps(xcom_codec.encode(value, "x"), allow_nan=False, ensure_ascii=False)
    assert "\\u0000" not in text.replace("\\\\", "")  # the escape, not the six characters
    text.encode()  # no lone surrogate


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 1e22, 1e16, 123456789012345678.0])
def test_numbers_jsonb_would_change_are_tagged(value: float) -> None:
    data = xcom_codec.encode(value, "x")
    assert data["__type__"] == "float"
    assert math.copysign(1, xcom_codec.decode(data)) == math.copysign(1, value)
    assert xcom_codec.decode(data) == value


def test_nan() -> None:
    assert math.isnan(xcom_codec.decode(xcom_codec.encode(math.nan, "x")))


@pytest.mark.parametrize("value", [None, True, 3, -1.5, "text", "é", [1, ["a"]], {"a": {"b": None}}])
def test_json_goes_through_as_it_is(value: Any) -> None:
    assert xcom_codec.encode(value, "x") == value


def test_zones_and_folds_survive() -> None:
    moment = datetime(2026, 10, 25, 2, 30, tzinfo=PARIS, fold=1)
    back = xcom_codec.decode(xcom_codec.encode(moment, "x"))
    assert (back, back.fold, back.tzinfo.key, back.utcoffset()) == (moment, 1, "Europe/Paris", moment.utcoffset())


def test_subclasses_become_what_they_are_made_of() -> None:
    Point = namedtuple("Point", "x y")
    assert xcom_codec.decode(xcom_codec.encode(Point(1, 2), "x")) == (1, 2)
    assert xcom_codec.encode(OrderedDict(a=1), "x") == {"a": 1}
    assert xcom_codec.decode(xcom_codec.encode(PurePosixPath("/a"), "x")) == Path("/a")
    assert xcom_codec.decode(xcom_codec.encode(time(1, 2), "x")) == time(1, 2)
    assert xcom_codec.decode(xcom_codec.encode({UUID(int=1): Decimal("1.50"), date(2026, 1, 1): b"\0"}, "x")) == {
        UUID(int=1): Decimal("1.50"), date(2026, 1, 1): b"\0",
    }  # fmt: skip


@dataclasses.dataclass
class Row:
    a: int


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Row(1), ["Row", "dataclasses.asdict"]),
        ([{"a": object()}], ["builtins.object at [0]['a']", "write it to a file"]),
        ((x for x in ()), ["generator", "return list(it)"]),
        ({"f": print}, ["builtin_function_or_method at ['f']"]),
    ],
)
def test_other_types_are_refused_with_a_remedy(value: Any, words: list[str]) -> None:
    with pytest.raises(TypeError) as caught:
        xcom_codec.encode(value, "the result of task 't'")
    assert str(caught.value).startswith("the result of task 't' cannot be kept: ")
    assert all(word in str(caught.value) for word in words)


def test_a_value_inside_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="in itself"):
        xcom_codec.encode(value, "x")


def test_decoding_never_trusts_a_name() -> None:
    with pytest.raises(ValueError, match=r"unknown type 'os\.system'"):
        xcom_codec.decode({"__type__": "os.system", "value": "true"})
    with pytest.raises(ValueError, match="unknown type"):
        xcom_codec.decode({"__type__": ["x"], "value": 1})


def test_size_limit() -> None:
    xcom_codec.check_size(["x" * 90], 100, "x")
    with pytest.raises(ValueError, match=r"takes 104 bytes .* core\.xcom_max_bytes = 100"):
        xcom_codec.check_size(["x" * 100], 100, "x")
    with pytest.raises(ValueError, match="takes 202 bytes"):
        xcom_codec.check_size("é" * 100, 100, "x")

"""Frames survive any way of being cut into pieces, and work survives the trip."""

from __future__ import annotations

import socket
from datetime import UTC, datetime

import pytest

from dflow.runtime.protocol import (
    FrameDecoder,
    Work,
    encode_frame,
    read_frame,
    work_from_json,
    work_to_json,
    write_frame,
)


def test_messages_come_out_however_the_bytes_are_cut() -> None:
    messages = [{"op": "a"}, {"op": "b", "text": "ä" * 300}, {"n": [1, 2, {"x": None}]}]
    stream = b"".join(encode_frame(message) for message in messages)
    for size in (1, 2, 3, 7, 64, len(stream)):
        decoder = FrameDecoder()
        out = [one for start in range(0, len(stream), size) for one in decoder.feed(stream[start : start + size])]
        assert out == messages


def test_a_frame_that_is_too_long_or_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        FrameDecoder().feed(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="one JSON object"):
        FrameDecoder().feed(b"\x00\x00\x00\x02[]")


def test_the_end_of_a_connection_reads_as_none() -> None:
    one, other = socket.socketpair()
    with one, other:
        write_frame(one, {"op": "x"})
        one.shutdown(socket.SHUT_WR)
        assert read_frame(other) == {"op": "x"}
        assert read_frame(other) is None


def test_work_survives_the_trip() -> None:
    now = datetime(2026, 11, 22, 10, 0, 0, 123, tzinfo=UTC)
    work = Work(
        ti_id=1,
        attempt_id="a",
        run_pk=2,
        dag_id="d",
        run_id="r",
        task_id="t",
        map_index=-1,
        try_number=1,
        user_failures=0,
        retries=2,
        run_type="manual",
        logical_date=None,
        data_interval_start=now,
        data_interval_end=now,
        run_after=now,
        run_started_at=None,
        conf={"k": [1]},
        bundle_hash="h",
        path="d.py",
        queue="default",
        pool="default_pool",
        priority_weight=3,
        hostname="host",
        started_at=now,
    )
    assert work_from_json(work_to_json(work)) == work

"""Task logs: chunks of lines in the order they were written, by attempt. They arrive while the task runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, text

from dflow.store.prepared import Prepared
from dflow.store.rows import storable


class Line(NamedTuple):
    """One line. ``at`` is seconds since the epoch; ``source`` a logger's name, "stdout" or "stderr"."""

    at: float
    level: str
    source: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Lines of one attempt; ``seq`` counts the attempt's chunks from 0, given by whoever writes."""

    attempt_id: str
    seq: int
    ti_id: int
    lines: Sequence[Line]


def append(tx: Connection, chunks: Sequence[Chunk]) -> None:
    """Store chunks of any attempts in one statement; a chunk stored before (a repeated write) is left as it is.

    Not fenced: what a superseded attempt wrote before its end is worth reading, under its own attempt id.
    """
    if not chunks:
        return
    _APPEND.execute(
        tx,
        {
            "attempt_ids": [chunk.attempt_id for chunk in chunks],
            "seqs": [chunk.seq for chunk in chunks],
            "ti_ids": [chunk.ti_id for chunk in chunks],
            "lines": [_document(chunk.lines) for chunk in chunks],
        },
    )


def read(tx: Connection, attempt_id: str, *, after_seq: int = -1, limit: int = 1000) -> list[Chunk]:
    """Return the chunks of an attempt after chunk ``after_seq``, in order; to follow, ask again with the last ``seq``.

    One range of the primary key.
    """
    rows = tx.execute(_READ, {"attempt_id": attempt_id, "after_seq": after_seq, "limit": limit})
    return [
        Chunk(
            attempt_id=row.attempt_id,
            seq=row.seq,
            ti_id=row.ti_id,
            lines=[Line(*line) for line in row.lines],
        )
        for row in rows
    ]


def next_seqs(tx: Connection, attempt_ids: Sequence[str]) -> dict[str, int]:
    """Return the number the next chunk of each attempt must have."""
    found = {row.attempt_id: row.next for row in tx.execute(_NEXT_SEQS, {"attempt_ids": list(attempt_ids)})}
    return {attempt_id: found.get(attempt_id, 0) for attempt_id in attempt_ids}


def _document(lines: Sequence[Line]) -> str:
    return json.dumps([[at, level, storable(source), storable(line)] for at, level, source, line in lines])


_APPEND = Prepared(
    """
    INSERT INTO log_chunk (attempt_id, seq, ti_id, lines)
    SELECT * FROM unnest(:attempt_ids, :seqs, :ti_ids, :lines) ON CONFLICT DO NOTHING""",
    {"attempt_ids": "uuid[]", "seqs": "integer[]", "ti_ids": "bigint[]", "lines": "jsonb[]"},
)

_READ = text("""
    SELECT CAST(attempt_id AS text) AS attempt_id, seq, ti_id, lines FROM log_chunk
    WHERE attempt_id = CAST(:attempt_id AS uuid) AND seq > :after_seq ORDER BY seq LIMIT :limit""")

_NEXT_SEQS = text("""
    SELECT CAST(attempt_id AS text) AS attempt_id, max(seq) + 1 AS next FROM log_chunk
    WHERE attempt_id = ANY(CAST(:attempt_ids AS uuid[])) GROUP BY attempt_id""")

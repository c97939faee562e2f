"""The nudge: what an executor publishes for one admitted attempt. It carries ids, and names for people; no more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Nudge:
    """Tells a worker that an attempt is waiting to be claimed. Losing or repeating one is harmless."""

    ti_id: int
    attempt_id: str
    dag_id: str
    task_id: str
    run_id: str
    map_index: int
    queue: str
    priority_weight: int

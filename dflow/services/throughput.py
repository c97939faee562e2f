"""How fast attempts end, per queue: what the lookahead of admission is computed from.

The scheduler keeps the broker short, so that priority is decided late: it publishes what live workers have free, plus
what they will drain in the next moment. That surplus is estimated from the ends it has just accounted. It never exceeds
the number of ends really seen in the last second, so a handful of long tasks that happen to end together does not fill
the broker, while no-op tasks ramp up to full speed within a few passes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Final

_WINDOW_SECONDS: Final = 1.0
_SHORTEST_SPAN_SECONDS: Final = 0.05
ANY_QUEUE: Final = "*"  # the lane of workers that take from every queue


class Throughput:
    """Ends per queue within the last second. Instants are monotonic seconds."""

    def __init__(self) -> None:
        self._batches: deque[tuple[float, Counter[str]]] = deque()

    def ended(self, counts: Mapping[str, int], now: float) -> None:
        """``counts`` attempts ended, by queue."""
        if counts:
            self._batches.append((now, Counter(counts)))

    def lookahead(self, seconds: float, now: float) -> dict[str, int]:
        """Return how many messages each queue will drain within ``seconds`` beyond the slots that are free now."""
        while self._batches and now - self._batches[0][0] > _WINDOW_SECONDS:
            self._batches.popleft()
        if not self._batches:
            return {}
        span = max(now - self._batches[0][0], _SHORTEST_SPAN_SECONDS)
        seen: Counter[str] = Counter()
        for _, counts in self._batches:
            seen.update(counts)
        seen[ANY_QUEUE] = sum(seen.values())
        return {queue: min(count, round(count / span * seconds)) for queue, count in seen.items()}

"""When a DAG file whose parse failed is tried again.

At once when anything in its bundle changed; otherwise with a growing pause, because the cause may lie outside of the
bundle: a package that is installed later, a slow disk, a machine out of memory. In memory only: after a restart each
failed file is tried once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

FIRST_PAUSE_SECONDS: Final = 60.0
LONGEST_PAUSE_SECONDS: Final = 3600.0


@dataclass(slots=True, kw_only=True)
class _Failed:
    bundle_hash: str
    pause_seconds: float
    due_at: float


class Retries:
    """The failed files of one bundle. ``clock`` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._files: dict[str, _Failed] = {}

    def failed(self, path: str, bundle_hash: str) -> None:
        """The file failed in that bundle."""
        before = self._files.get(path)
        pause = FIRST_PAUSE_SECONDS
        if before is not None and before.bundle_hash == bundle_hash:
            pause = min(before.pause_seconds * 2, LONGEST_PAUSE_SECONDS)
        self._files[path] = _Failed(bundle_hash=bundle_hash, pause_seconds=pause, due_at=self._clock() + pause)

    def forget(self, path: str) -> None:
        """The file is good, or gone."""
        self._files.pop(path, None)

    def due(self, failed: Iterable[str], bundle_hash: str) -> set[str]:
        """Return which of the failed files to try now: those not yet tried in this bundle, and those whose time has
        come."""
        return {path for path in failed if not self._is_known(path, bundle_hash) or self._is_due(path)}

    def is_any_due(self) -> bool:
        """Has the time of any file come?"""
        return any(self._is_due(path) for path in self._files)

    def _is_known(self, path: str, bundle_hash: str) -> bool:
        return path in self._files and self._files[path].bundle_hash == bundle_hash

    def _is_due(self, path: str) -> bool:
        return self._files[path].due_at <= self._clock()

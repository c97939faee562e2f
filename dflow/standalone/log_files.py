"""The log files of a home: a fresh one for each start, the last few kept. Pure file operations."""

from __future__ import annotations

from pathlib import Path
from typing import Final

KEEP: Final = 5


def rotate(path: Path, *, keep: int = KEEP) -> None:
    """Move `x.log` to `x.log.1`, `x.log.1` to `x.log.2` and so on, dropping what would be beyond `keep` old files.

    An empty file stays: it has nothing to keep.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    _numbered(path, keep).unlink(missing_ok=True)
    for number in range(keep - 1, 0, -1):
        if _numbered(path, number).exists():
            _numbered(path, number).rename(_numbered(path, number + 1))
    path.rename(_numbered(path, 1))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")

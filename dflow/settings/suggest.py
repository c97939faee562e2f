""" "Did you mean": the nearest of the names that exist. difflib is imported only when something is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_CLOSE: Final = 0.6  # difflib's own cutoff of get_close_matches
_NOISE: Final = 0.1


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return up to three of the known names that are close to the word, best first, whatever the case.

    Names that are much further away than the best one are left out: they are noise beside it.
    """
    from difflib import SequenceMatcher

    folded = word.lower()
    ratios = {name: SequenceMatcher(None, folded, name.lower()).ratio() for name in known}
    close = sorted((name for name in ratios if ratios[name] >= _CLOSE), key=lambda name: (-ratios[name], name))
    return [name for name in close[:3] if ratios[name] >= ratios[close[0]] - _NOISE]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean a or b?`` or nothing."""
    names = nearest(word, known)
    return f"; did you mean {' or '.join(names)}?" if names else ""

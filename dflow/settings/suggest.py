""" "Did you mean": the nearest of the names that exist. difflib is imported only when something is wrong."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return up to three of the known names that are close to the word, best first, whatever the case."""
    from difflib import get_close_matches

    by_folded = {name.lower(): name for name in known}
    return [by_folded[match] for match in get_close_matches(word.lower(), by_folded, n=3, cutoff=0.6)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean a or b?`` or nothing."""
    names = nearest(word, known)
    return f"; did you mean {' or '.join(names)}?" if names else ""

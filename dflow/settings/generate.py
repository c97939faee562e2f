"""Writes a commented ``dflow.cfg``: every setting with its meaning, unit, default and variable, all commented out."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from dflow.settings.schema import SECTION_CLASSES, Setting, declarations

_HEADER = """\
# dflow.cfg: the settings of dflow. Every setting is here with its default; remove the `#` in front of it to change it.
#
# A setting is decided by the first of: the environment variable DFLOW__SECTION__KEY; the output of the command in
# DFLOW__SECTION__KEY_CMD; `key` in this file; the output of the command in `key_cmd` in this file; the default.
# Comments need a line of their own. `dflow config check` says what is wrong, `dflow config explain SECTION.KEY` where a
# value comes from.
"""

_KINDS = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "path": "path"}


def config_text() -> str:
    """Return the text of the file."""
    return _HEADER + "".join(_section(name, keys) for name, keys in declarations().items())


def _section(name: str, keys: dict[str, Setting]) -> str:
    doc = (SECTION_CLASSES[name].__doc__ or "").strip()
    return f"\n\n[{name}]\n{_comment(doc)}" + "".join(f"\n{_setting(setting)}" for setting in keys.values())


def _setting(setting: Setting) -> str:
    comments = _comment(setting.description) + _comment(" ".join(_facts(setting)))
    return f"{comments}# {setting.key} = {setting.default}\n"


def _facts(setting: Setting) -> Iterator[str]:
    unit = f" of {setting.unit}" if setting.unit else ""
    yield f"Type: {_KINDS[setting.kind]}{unit}{', or none' if setting.is_optional else ''}."
    if setting.choices:
        yield f"One of: {', '.join(setting.choices)}."
    if setting.minimum is not None:
        yield f"At least {setting.minimum:g}."
    if setting.maximum is not None:
        yield f"At most {setting.maximum:g}."
    yield f"Variable: {setting.env_name}."
    if setting.allows_command:
        yield f"May come from a command: {setting.key}_cmd."


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False))

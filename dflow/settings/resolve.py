"""The five steps that decide a setting, exactly in this order:

1. the environment variable ``DFLOW__SECTION__KEY``,
2. the output of the command in ``DFLOW__SECTION__KEY_CMD``,
3. ``key`` in ``dflow.cfg``,
4. the output of the command in ``key_cmd`` in ``dflow.cfg``,
5. the default.

A variable or key that is present but empty counts as set, as in Airflow. Commands (2 and 4) are for the settings that
hold secrets or addresses; only a command that wins is run, and only once. The resolver remembers every source it saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dflow.settings import command, file, values
from dflow.settings.schema import ENV_PREFIX, Setting, all_settings, declarations
from dflow.settings.suggest import nearest
from dflow.settings.values import BadValueError, Value

_CMD: Final = "_CMD"
_SEE_LIST: Final = "; `dflow config list` shows what there is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One source that says something about a setting. ``shown`` is its text, redacted; of a command, its program."""

    step: int  # 1 to 5; 0 is a value given in the program, such as an option of the command line
    source: str  # for people: "environment variable DFLOW__CORE__EXECUTOR", "/home/ann/.dflow/dflow.cfg:12"
    shown: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Where a setting comes from: the winner first, then the sources it won over. Holds no secret."""

    setting: Setting
    shown: str  # the value in effect, redacted
    winner: Candidate
    losers: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """One setting with its value; ``problem`` says why there is none."""

    setting: Setting
    value: Value
    winner: Candidate
    losers: tuple[Candidate, ...]
    problem: str | None = None

    def explain(self) -> Explanation:
        """Return what may be shown of it."""
        shown = values.shown(self.setting, values.to_text(self.value)) if self.problem is None else "(invalid)"
        return Explanation(setting=self.setting, shown=shown, winner=self.winner, losers=self.losers)


@dataclass(frozen=True, slots=True)
class _Found:
    """A source with its real text; stays inside this module."""

    candidate: Candidate
    text: str
    is_command: bool


class Resolver:
    """Resolves settings one by one from an environment and a file, both read once."""

    def __init__(self, *, home: Path, config_file: file.ConfigFile, env: Mapping[str, str]) -> None:
        self._home = home
        self._file = config_file
        self._env = env

    def resolve(self, setting: Setting) -> Resolved:
        """Resolve one setting; runs its command when a command wins."""
        found = list(self._found(setting))
        winner, losers = found[0], tuple(other.candidate for other in found[1:])
        try:
            text = command.output_of(winner.text, self._env) if winner.is_command else winner.text
            value = values.parse(setting, text, self._home)
        except BadValueError as error:
            problem = f"{setting.name}: {_without_secret(setting, winner, error)} ({winner.candidate.source})"
            return Resolved(setting=setting, value=None, winner=winner.candidate, losers=losers, problem=problem)
        return Resolved(setting=setting, value=value, winner=winner.candidate, losers=losers)

    def problems(self) -> list[str]:
        """Return what is wrong with the sources themselves: syntax, unknown names, commands where there are none."""
        return [*self._file.problems, *self._file_problems(), *self._env_problems()]

    def _found(self, setting: Setting) -> Iterator[_Found]:
        env_name, in_file = setting.env_name, self._file.values.get(setting.section, {})
        if env_name in self._env:
            yield _plain(setting, 1, f"environment variable {env_name}", self._env[env_name])
        if setting.allows_command and env_name + _CMD in self._env:
            yield _command(2, f"environment variable {env_name}{_CMD}", self._env[env_name + _CMD])
        if setting.key in in_file:
            yield _plain(setting, 3, self._place(setting.section, setting.key), in_file[setting.key])
        command_key = setting.key + _CMD.lower()
        if setting.allows_command and command_key in in_file:
            yield _command(4, self._place(setting.section, command_key), in_file[command_key])
        yield _plain(setting, 5, "default", setting.default)

    def _place(self, section: str, key: str) -> str:
        line = self._file.lines.get((section, key))
        return f"{self._file.path}:{line}" if line else str(self._file.path)

    def _file_problems(self) -> Iterator[str]:
        known = declarations()
        for section, keys in self._file.values.items():
            if section not in known:
                where = self._place(section, "")
                yield f"{where}: there is no section [{section}]{_or_list(section, known)}"
                continue
            for key in keys:
                problem = _key_problem(section, key)
                if problem:
                    yield f"{self._place(section, key)}: {problem}"

    def _env_problems(self) -> Iterator[str]:
        known = {s.env_name for s in all_settings()}
        commands = {s.env_name + _CMD for s in all_settings() if s.allows_command}
        for name in sorted(self._env):
            if not name.upper().startswith(ENV_PREFIX) or name in known or name in commands:
                continue
            yield f"{name}: {_env_problem(name, known, commands)}"


def _plain(setting: Setting, step: int, source: str, text: str) -> _Found:
    shown = values.shown(setting, text.strip())
    return _Found(Candidate(step=step, source=source, shown=shown), text, is_command=False)


def _command(step: int, source: str, text: str) -> _Found:
    return _Found(
        Candidate(step=step, source=source, shown=f"output of {command.program_of(text)!r}"), text, is_command=True
    )


def _without_secret(setting: Setting, winner: _Found, error: BadValueError) -> str:
    """Errors of parsing quote the value, which must not happen to a secret; those of a command are safe."""
    if setting.is_secret and not winner.is_command:
        return "the value cannot be used"
    return str(error)


def _key_problem(section: str, key: str) -> str | None:
    known = declarations()[section]
    if key in known:
        return None
    base = key.removesuffix(_CMD.lower())
    if base != key and base in known:
        allowed = known[base].allows_command
        return None if allowed else f"[{section}] {base} cannot come from a command; write {base} = value"
    return f"[{section}] has no setting {key}{_key_hint(section, key)}"


def _key_hint(section: str, key: str) -> str:
    """The nearest key of the section, or the same key of another section: people remember names better than places."""
    elsewhere = [f"[{other}] {key}" for other, keys in declarations().items() if key in keys]
    names = elsewhere or nearest(key, declarations()[section])
    return f"; did you mean {' or '.join(names[:3])}?" if names else _SEE_LIST


def _named(key: str) -> Iterator[Setting]:
    return (setting for setting in all_settings() if setting.key == key)


def _env_problem(name: str, known: Iterable[str], commands: Iterable[str]) -> str:
    if name.endswith(_CMD) and name.removesuffix(_CMD) in known:
        base = name.removesuffix(_CMD)
        return f"this setting cannot come from a command; set {base}"
    if name.upper() in known or name.upper() in commands:
        return f"the name must be in capital letters: {name.upper()}"
    section, _, key = (part.lower() for part in name[len(ENV_PREFIX) :].partition("__"))
    if section not in declarations():
        names = [f"{ENV_PREFIX}{near.upper()}__{key.upper()}" for near in nearest(section, declarations())]
        what = f"there is no section {section!r}"
    else:
        keys = declarations()[section]
        names = [setting.env_name for setting in _named(key)] or [keys[near].env_name for near in nearest(key, keys)]
        what = f"there is no setting {key!r} in section {section}"
    return f"{what}; did you mean {' or '.join(names)}?" if names else f"{what}{_SEE_LIST}"


def _or_list(section: str, known: Iterable[str]) -> str:
    names = list(known)
    close = nearest(section, names)
    return f"; did you mean [{close[0]}]?" if close else f"; there are {', '.join(f'[{name}]' for name in names)}"

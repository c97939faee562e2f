"""The one frozen object every component is given: all settings, resolved, checked, and where each is from.

`load` is called once, at the edge of a process. Nothing else reads the environment or the file for settings.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dflow.core.errors import NotFoundError, SettingsError
from dflow.settings import checks, file, values
from dflow.settings.resolve import Candidate, Explanation, Resolved, Resolver
from dflow.settings.schema import (
    SECTION_CLASSES,
    CelerySettings,
    CoreSettings,
    DagProcessorSettings,
    DatabaseSettings,
    LoggingSettings,
    OperatorsSettings,
    SchedulerSettings,
    Setting,
    WorkerSettings,
    all_settings,
    declarations,
)
from dflow.settings.suggest import did_you_mean
from dflow.settings.values import BadValueError, Value

CONFIG_FILE_NAME: Final = "dflow.cfg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, by section: ``settings.core.executor``. Its repr and `explain` show no secret."""

    home: Path  # $DFLOW_HOME, absolute
    config_file: Path  # $DFLOW_CONFIG or dflow.cfg in the home; need not exist
    core: CoreSettings
    database: DatabaseSettings
    celery: CelerySettings
    operators: OperatorsSettings
    scheduler: SchedulerSettings
    worker: WorkerSettings
    dag_processor: DagProcessorSettings
    logging: LoggingSettings
    explanations: Mapping[str, Explanation] = field(repr=False, compare=False)

    def value(self, section: str, key: str) -> Value:
        """Return one value by name, raising NotFoundError with "did you mean"."""
        setting = find(section, key)
        return _value(self, setting)

    def explain(self, section: str, key: str) -> Explanation:
        """Return where a value comes from: the value in effect (redacted), the winning source and the losing ones."""
        return self.explanations[find(section, key).name]

    def as_env(self) -> dict[str, str]:
        """Return every resolved value as ``DFLOW__SECTION__KEY``, for child processes.

        Step 1 wins over all others, so a child started with these runs no command and sees what its parent saw,
        whatever happens to the file meanwhile. Contains the secrets.
        """
        env = {"DFLOW_HOME": str(self.home)}
        if self.config_file.exists():
            env["DFLOW_CONFIG"] = str(self.config_file)
        return env | {s.env_name: values.to_text(_value(self, s)) for s in all_settings()}

    def with_values(self, changes: Mapping[str, Value], *, source: str) -> Settings:
        """Return a copy with other values (``{"core.executor": "LocalExecutor"}``), checked like all others.

        ``source`` says for `explain` where they are from, e.g. "option --executor". Raises SettingsError.
        """
        sections: dict[str, dict[str, Value]] = {}
        explanations = dict(self.explanations)
        problems: list[str] = []
        for name, value in changes.items():
            setting = find(*name.split(".", 1))
            try:
                value = values.parse(setting, values.to_text(value), self.home)
            except BadValueError as error:
                problems.append(f"{name}: {'the value cannot be used' if setting.is_secret else error} ({source})")
                continue
            sections.setdefault(setting.section, {})[setting.key] = value
            explanations[name] = _overridden(explanations[name], values.to_text(value), source)
        changed: dict[str, Any] = {
            name: dataclasses.replace(getattr(self, name), **keys) for name, keys in sections.items()
        }
        result = dataclasses.replace(self, **changed, explanations=explanations)
        problems += checks.problems(result)
        if problems:
            raise SettingsError(problems)
        return result


def load(home: Path | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """Resolve and check every setting.

    ``home`` is the home directory, else ``$DFLOW_HOME``, else ``~/.dflow``; ``env`` the environment, else our own.
    Raises SettingsError with all problems at once. Runs the commands of ``_CMD`` settings that win. Writes nothing.
    """
    env = os.environ if env is None else env
    home = home_of(env, home)
    resolver = resolver_for(home, env)
    resolved = [resolver.resolve(setting) for setting in all_settings()]
    problems = resolver.problems() + [item.problem for item in resolved if item.problem is not None]
    if problems:
        # Checks between settings need all of them; those that can be made are made, so that nothing comes later.
        raise SettingsError(problems + _cross_problems(resolved, home, env))
    settings = _build(resolved, home, config_path(home, env))
    problems = checks.problems(settings)
    if problems:
        raise SettingsError(problems)
    return settings


def resolver_for(home: Path, env: Mapping[str, str]) -> Resolver:
    """Return the resolver for single settings, which works however broken the others are."""
    config = file.read(config_path(home, env), must_exist=bool(env.get("DFLOW_CONFIG")))
    return Resolver(home=home, config_file=config, env=env)


def home_of(env: Mapping[str, str], home: Path | None = None) -> Path:
    """Return the absolute home directory."""
    chosen = home or Path(env.get("DFLOW_HOME") or "~/.dflow")
    return Path(os.path.abspath(chosen.expanduser()))


def config_path(home: Path, env: Mapping[str, str]) -> Path:
    """Return where the file is, or would be."""
    named = env.get("DFLOW_CONFIG")
    return Path(os.path.abspath(Path(named).expanduser())) if named else home / CONFIG_FILE_NAME


def find(section: str, key: str) -> Setting:
    """Return the declaration of a setting by name, in any case, raising NotFoundError with "did you mean"."""
    section, key = section.lower(), key.lower()
    known = declarations()
    if section not in known:
        raise NotFoundError(f"there is no section {section!r}{did_you_mean(section, known)}")
    if key not in known[section]:
        raise NotFoundError(f"section {section} has no setting {key!r}{did_you_mean(key, known[section])}")
    return known[section][key]


def _value(settings: Settings, setting: Setting) -> Value:
    value: Value = getattr(getattr(settings, setting.section), setting.key)
    return value


def _build(resolved: list[Resolved], home: Path, config_file: Path) -> Settings:
    by_section: dict[str, dict[str, Value]] = {section: {} for section in SECTION_CLASSES}
    for item in resolved:
        by_section[item.setting.section][item.setting.key] = item.value
    sections: dict[str, Any] = {name: cls(**by_section[name]) for name, cls in SECTION_CLASSES.items()}
    explanations = {item.setting.name: item.explain() for item in resolved}
    return Settings(home=home, config_file=config_file, explanations=explanations, **sections)


def _cross_problems(resolved: list[Resolved], home: Path, env: Mapping[str, str]) -> list[str]:
    """Check the rest with the defaults in place of what is broken, and keep what is not about a broken setting."""
    broken = {item.setting.name for item in resolved if item.problem is not None}
    mended = [
        dataclasses.replace(item, value=values.parse(item.setting, item.setting.default, home), problem=None)
        if item.problem is not None
        else item
        for item in resolved
    ]
    found = checks.problems(_build(mended, home, config_path(home, env)))
    return [problem for problem in found if not any(name in problem for name in broken)]


def _overridden(before: Explanation, text: str, source: str) -> Explanation:
    shown = values.shown(before.setting, text)
    winner = Candidate(step=0, source=source, shown=shown)
    return Explanation(setting=before.setting, shown=shown, winner=winner, losers=(before.winner, *before.losers))

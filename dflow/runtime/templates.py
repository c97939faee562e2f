"""Rendering an operator's template fields: Jinja in strings, template files, and stand-ins such as task results.

The operator that a DAG file made stays as it is: `render_fields` sets rendered copies on a copy. Containers are always
rebuilt, so that a task which changes its arguments does not change those of the next attempt in a warm process. Jinja
is imported and an environment made only when something has to be rendered; environments and compiled templates are
kept with their DAG.
"""

from __future__ import annotations

import copy
import os
import re
import weakref
from collections import ChainMap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from dflow.authoring.context import Context
from dflow.authoring.exceptions import AirflowException
from dflow.authoring.resolvable import Resolvable, is_operator
from dflow.runtime.macros import FILTERS

if TYPE_CHECKING:
    import jinja2

    from dflow.authoring.dag import DAG
    from dflow.authoring.operator import BaseOperator

_MARKS: Final = ("{{", "{%", "{#")
_KEPT_TEMPLATES: Final = 512  # per environment; a DAG has fewer
_UNDEFINED: Final = re.compile(r"'(\w+)' is undefined")
_environments: weakref.WeakKeyDictionary[DAG, dict[bool, _Environment]] = weakref.WeakKeyDictionary()


class TemplateRenderError(AirflowException):
    """A template field could not be rendered; the message names the field and what is wrong with it."""


def render_fields(task: BaseOperator, context: Context) -> None:
    """Render the template fields of ``task``, a copy made for this attempt, in place.

    Raises `TemplateRenderError`, `XComNotFound`, or whatever user code inside a template raises.
    """
    for name in task.template_fields:
        value = getattr(task, name)
        if value is None:
            continue
        setattr(task, name, render(value, context, task, field=name, template_ext=task.template_ext))


def render(
    value: Any, context: Context, task: BaseOperator, *, field: str = "value", template_ext: Sequence[str] = ()
) -> Any:
    """Return ``value`` with everything inside it rendered.

    Strings are templates, or paths of template files when they end in one of ``template_ext``; lists, tuples, sets and
    values of dicts are gone through; so are objects with ``template_fields`` of their own (on a copy).
    """
    return _Rendering(context, task, field, tuple(template_ext)).value(value)


class _Rendering:
    """One field being rendered."""

    __slots__ = ("_context", "_extensions", "_field", "_native", "_task")

    def __init__(self, context: Context, task: BaseOperator, field: str, extensions: tuple[str, ...]) -> None:
        self._context, self._task, self._field, self._extensions = context, task, field, extensions
        own = task.render_template_as_native_obj
        self._native = task.dag.render_template_as_native_obj if own is None else own

    def value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._string(value)
        if value is None or isinstance(value, int | float):
            return value
        if isinstance(value, Resolvable):
            return value.resolve(self._context)
        if isinstance(value, tuple):
            items = [self.value(item) for item in value]
            return tuple(items) if type(value) is tuple else type(value)(*items)  # named tuples keep their type
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, set | frozenset):
            return type(value)(self.value(item) for item in value)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        fields = getattr(value, "template_fields", None)
        if not isinstance(fields, tuple | list) or isinstance(value, type) or is_operator(value):
            return value
        value = copy.copy(value)
        for name in fields:
            setattr(value, name, self.value(getattr(value, name)))
        return value

    def _string(self, text: str) -> Any:
        is_file = bool(self._extensions) and text.endswith(self._extensions)
        if not is_file and not self._may_be_template(text):
            return _environment(self._task.dag, native=True).literal(text) if self._native else text
        environment = _environment(self._task.dag, native=self._native)
        import jinja2

        try:
            template = environment.file(text) if is_file else environment.string(text)
            return environment.render(template, self._context)
        except jinja2.TemplateNotFound as error:
            raise TemplateRenderError(
                f"template file {error.name!r} of {self._field!r} was not found in "
                f"{', '.join(search_path(self._task.dag))}; put it there or set template_searchpath"
                + (" (to run a command that ends like a template file, end it with a space)" if is_file else "")
            ) from None
        except jinja2.TemplateError as error:
            raise TemplateRenderError(f"{self._field!r} cannot be rendered: {self._explain(error)}") from None

    def _may_be_template(self, text: str) -> bool:
        # options may give Jinja other marks; then every string is for it to judge
        return any(mark in text for mark in _MARKS) or bool(self._task.dag.jinja_environment_kwargs)

    def _explain(self, error: jinja2.TemplateError) -> str:
        text = str(error)
        match = _UNDEFINED.fullmatch(text)
        line = getattr(error, "lineno", None)
        if match and match[1] not in self._context:
            return f"{text}; {self._context.why_absent(match[1])}"
        return f"{text} (line {line})" if line else text


def search_path(dag: DAG) -> list[str]:
    """Return where template files are looked for: the DAG file's folder, then the search path, relative to it."""
    return [dag.folder, *(os.path.join(dag.folder, path) for path in dag.template_searchpath)]


class _Variables(ChainMap[str, Any]):
    """What a template sees: the context, behind it the globals. Jinja's types say dict; a mapping is enough."""

    def copy(self) -> Any:
        """Return the variables computed so far; Jinja shows them in tracebacks."""
        return self.maps[0].computed()  # type: ignore[attr-defined]


class _Environment:
    """A Jinja environment of one DAG, with its compiled templates."""

    def __init__(self, dag: DAG, *, native: bool) -> None:
        self._is_native = native
        self._jinja = _make_environment(dag, native=native)
        self._compiled: dict[str, jinja2.Template] = {}

    def string(self, source: str) -> jinja2.Template:
        """Return the compiled template; the same source is compiled once."""
        template = self._compiled.get(source)
        if template is None:
            if len(self._compiled) >= _KEPT_TEMPLATES:
                self._compiled.clear()
            template = self._compiled[source] = self._jinja.from_string(source)
        return template

    def file(self, name: str) -> jinja2.Template:
        """Return the compiled template of a file."""
        return self._jinja.get_template(name)

    def render(self, template: jinja2.Template, context: Context) -> Any:
        """Render without computing context variables that the template does not use.

        ``Template.render`` copies its variables into a dict, which would compute all of them.
        """
        environment = self._jinja
        variables = cast("dict[str, Any]", _Variables(cast("Any", context), cast("Any", template.globals)))
        scope = environment.context_class(environment, variables, template.name, template.blocks)
        try:
            pieces = template.root_render_func(scope)
            return _native_concat(pieces) if self._is_native else "".join(pieces)
        except Exception:  # noqa: BLE001 -- Jinja rewrites the traceback to the template's lines and raises it again
            environment.handle_exception()

    def literal(self, text: str) -> Any:
        """Return a string without template as native rendering does: "1" is 1 (Airflow's, and Jinja's, rule)."""
        return _native_concat([text])


def _native_concat(pieces: Iterable[Any]) -> Any:
    from jinja2.nativetypes import native_concat

    return native_concat(pieces)


def _environment(dag: DAG, *, native: bool) -> _Environment:
    kept = _environments.setdefault(dag, {})
    if native not in kept:
        kept[native] = _Environment(dag, native=native)
    return kept[native]


def _make_environment(dag: DAG, *, native: bool) -> jinja2.Environment:
    import jinja2
    from jinja2 import nativetypes, sandbox

    class Sandboxed(sandbox.SandboxedEnvironment):
        """Jinja's sandbox, which lets templates read names that begin with one underscore, as Airflow's does."""

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return not sandbox.is_internal_attribute(obj, attr)

    class SandboxedNative(Sandboxed, nativetypes.NativeEnvironment):
        """The sandbox with native results."""

    options: dict[str, Any] = {
        "loader": jinja2.FileSystemLoader(search_path(dag)),
        "undefined": dag.template_undefined or jinja2.StrictUndefined,
        "extensions": ["jinja2.ext.do"],
        "autoescape": False,  # commands and SQL, not HTML
        **dag.jinja_environment_kwargs,
    }
    environment: jinja2.Environment = (SandboxedNative if native else Sandboxed)(**options)
    environment.globals.update(dag.user_defined_macros)
    environment.filters.update(FILTERS)
    environment.filters.update(dag.user_defined_filters)
    return environment

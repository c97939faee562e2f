"""Importing a DAG file by path, and finding the DAGs it makes.

The file is compiled from its source (never from a cached .pyc) and run under a module name of its own; its folder and
the root of its bundle are importable meanwhile. Afterwards ``sys.path`` and ``sys.modules`` are as before: modules of
the bundle are kept with the `LoadedFile` and put back while its code runs (`LoadedFile.active`), so that two versions
of one bundle, or two bundles with a ``utils.py``, live side by side in one warm process.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Final

from dflow.authoring import blocks
from dflow.authoring.dag import DAG
from dflow.core.errors import DagDefinitionError, DagImportError

if TYPE_CHECKING:
    from types import TracebackType

_IMPORT_SYSTEM: Final = "<frozen importlib"


class LoadedFile:
    """A DAG file that was imported: its DAGs by id, the files of the bundle it is made of, and its modules.

    ``imports`` are absolute paths below the bundle's root, the DAG file among them. Keep it to run more attempts
    without importing again; drop it, or call `unload`, to free its modules.
    """

    def __init__(self, file: Path, bundle_root: Path) -> None:
        self.file = file
        self.bundle_root = bundle_root
        self.dags: dict[str, DAG] = {}
        self.imports: frozenset[Path] = frozenset()
        self._prefix = os.path.join(str(bundle_root), "")
        self._modules: dict[str, ModuleType] = {}
        self._front = list(dict.fromkeys((str(file.parent), str(bundle_root))))  # of sys.path
        self._back: list[str] = []
        self._is_active = False
        self._shadowed = _shadowed_names(self._front)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make the bundle importable and its modules present inside the block; what is imported there is kept too.

        Inside another such block of the same file it does nothing.
        """
        if self._is_active:
            yield
            return
        self._is_active = True
        path, hidden = sys.path[:], _hide(self._shadowed)
        writes_bytecode = sys.dont_write_bytecode
        sys.dont_write_bytecode = True  # a bundle is read only, and a .pyc younger than one second may be stale
        sys.path[:] = [*self._front, *path, *self._back]
        sys.modules.update(self._modules)
        count = len(sys.modules)
        try:
            yield
        finally:
            self._is_active = False
            sys.dont_write_bytecode = writes_bytecode
            if len(sys.modules) != count:
                self._collect()
            for name in self._modules:
                sys.modules.pop(name, None)
            sys.modules.update(hidden)
            self._remember_path(path)
            sys.path[:] = path

    def _remember_path(self, before: list[str]) -> None:
        """Keep what the file put in front of sys.path or behind it, for the next time."""
        places = [place for place, entry in enumerate(sys.path) if entry in before and entry not in self._front]
        first, last = (places[0], places[-1]) if places else (len(sys.path), len(sys.path))
        self._front, self._back = sys.path[:first], sys.path[last + 1 :]

    def _collect(self) -> None:
        """Take note of the modules of the bundle that were imported."""
        for name, module in list(sys.modules.items()):
            if name not in self._modules and self._is_ours(module):
                self._modules[name] = module
        self.imports = frozenset(Path(file) for module in self._modules.values() if (file := _file_of(module)))

    def _is_ours(self, module: ModuleType) -> bool:
        file = _file_of(module)
        if file is not None:
            return file.startswith(self._prefix)
        places = list(getattr(module, "__path__", None) or ())  # a namespace package has places but no file
        return bool(places) and all(str(place).startswith(self._prefix) for place in places)

    def unload(self) -> None:
        """Forget the modules and DAGs."""
        self._modules.clear()
        self.dags.clear()


def load_dags(file: Path, *, bundle_root: Path) -> LoadedFile:
    """Import a DAG file and return what it defines.

    Parameters:
        file: absolute path of the file, below ``bundle_root``.
        bundle_root: the folder that local modules are imported from.

    Found are DAGs in variables of the module, and those of ``with DAG(...)`` blocks and ``@dag`` calls made while this
    very file (not a module it imports) is run. Raises `DagImportError`, with the user's part of the traceback, for
    whatever the file raises, `SystemExit` included; a MemoryError and interrupts pass through.
    """
    loaded = LoadedFile(file, bundle_root)
    with loaded.active(), _described(file), blocks.listening() as made:
        module = _run(file, bundle_root)
        loaded.dags = _find_dags(module, made, str(file))
    for dag in loaded.dags.values():
        dag.fileloc = str(file)
        dag.code = loaded
    return loaded


def _run(file: Path, bundle_root: Path) -> ModuleType:
    module = ModuleType(_module_name(file, bundle_root))
    module.__file__ = str(file)
    code: CodeType = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
    sys.modules[module.__name__] = module  # dataclasses, typing and pickle look a class's module up there
    exec(code, module.__dict__)  # noqa: S102 -- running the DAG file is what this is for
    return module


def _module_name(file: Path, bundle_root: Path) -> str:
    """Return a name that no other module has and that people recognize, like ``dflow_dag_etl_report``.

    No dots: pickle imports a module by its name, and would look for parents.
    """
    place = os.path.splitext(os.path.relpath(file, bundle_root))[0]
    return "dflow_dag_" + re.sub(r"\W", "_", place)


def _find_dags(module: ModuleType, made: list[tuple[DAG, str]], file: str) -> dict[str, DAG]:
    found: dict[str, DAG] = {}
    in_variables = [value for value in vars(module).values() if isinstance(value, DAG)]
    registered = [dag for dag, maker in made if maker == file]
    for dag in (*in_variables, *registered):
        other = found.setdefault(dag.dag_id, dag)
        if other is not dag:
            raise DagDefinitionError(
                f"two DAGs of this file have the id {dag.dag_id!r} (the other: {other.location}); give each its own",
                file=dag.location.file if dag.location else file,
                line=dag.location.line if dag.location else None,
            )
    return found


def _file_of(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return file if isinstance(file, str) else None


def _shadowed_names(path: list[str]) -> tuple[str, ...]:
    """Return the top-level modules that are loaded but that the bundle has a file of its own for.

    Looked at once per file. The standard library and dflow itself are never hidden.
    """
    names = {name.partition(".")[0] for name in list(sys.modules)} - sys.stdlib_module_names - {"dflow", "__main__"}
    return tuple(
        name
        for name in sorted(names)
        if any(
            os.path.exists(os.path.join(folder, f"{name}.py")) or os.path.isdir(os.path.join(folder, name))
            for folder in path
        )
    )


def _hide(names: tuple[str, ...]) -> dict[str, ModuleType]:
    if not names:
        return {}
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    for name in hidden:
        del sys.modules[name]
    return hidden


# ---- errors ----


@contextlib.contextmanager
def _described(file: Path) -> Iterator[None]:
    """Turn what the file raises into a `DagImportError` that says where and why."""
    try:
        yield
    except (DagImportError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise DagImportError(_message(error, file), traceback=_user_traceback(error)) from error


def _message(error: BaseException, file: Path) -> str:
    if isinstance(error, DagDefinitionError):
        return str(error) if error.file else f"{file}: {error}"
    match error:
        case SyntaxError():
            return f"{error.filename or file}:{error.lineno}: {type(error).__name__}: {error.msg}"
        case SystemExit():
            text = f"the file called sys.exit({error.code!r}) while it was imported; only tasks may end a process"
        case FileNotFoundError() if error.filename == str(file):
            return f"{file}: the file does not exist"
        case ModuleNotFoundError():
            text = (
                f"ModuleNotFoundError: {error}; put the module into the DAG folder, or install its package where the "
                "dag-processor and the workers run"
            )
        case _:
            text = "".join(traceback.format_exception_only(error)).strip()
    return f"{_where(error.__traceback__, file)}: {text}"


def _where(trace: TracebackType | None, file: Path) -> str:
    """Return "file:line" of the innermost frame in the DAG file or beside it, else just the file."""
    where = str(file)
    for frame, line in traceback.walk_tb(trace):
        if frame.f_code.co_filename == str(file):
            where = f"{file}:{line}"
    return where


def _user_traceback(error: BaseException) -> str:
    """Format the traceback without frames of dflow and of the import system, in the causes too."""
    formatted = traceback.TracebackException.from_exception(error, compact=True)
    todo: list[traceback.TracebackException | None] = [formatted]
    seen: set[int] = set()
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        node.stack = traceback.StackSummary.from_list([frame for frame in node.stack if not _is_ours(frame.filename)])
        todo += [node.__cause__, node.__context__]
    return "".join(formatted.format())


def _is_ours(filename: str) -> bool:
    from dflow.authoring.refusal import is_user_file

    return filename.startswith(_IMPORT_SYSTEM) or not is_user_file(filename)

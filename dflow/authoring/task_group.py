"""TaskGroup: a name space for tasks and a fold in the UI. It prefixes ids, passes default_args on and takes arrows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dflow.authoring import blocks, checks
from dflow.authoring.node import Node
from dflow.authoring.refusal import not_supported, refusal, unknown_arguments, user_location
from dflow.core.errors import DuplicateTaskIdError

if TYPE_CHECKING:
    from dflow.authoring.dag import DAG
    from dflow.authoring.operator import BaseOperator


class TaskGroup(Node):
    """A group of tasks; use it as ``with TaskGroup("load") as load:``.

    Parameters (Airflow's):
        group_id: letters, digits, ``_ -``; None only for the root group of a DAG.
        prefix_group_id: whether ids of its members become ``group_id.member_id``.
        parent_group, dag: where it belongs; by default the block it is made in.
        default_args: arguments its members take when not given, over those of the DAG.
        tooltip, group_display_name, doc_md, ui_color, ui_fgcolor: for people.
        add_suffix_on_collision: take ``group_id__1`` when the id is in use, instead of refusing.
    """

    def __init__(
        self,
        group_id: str | None,
        group_display_name: str = "",
        prefix_group_id: bool = True,
        parent_group: TaskGroup | None = None,
        dag: DAG | None = None,
        default_args: Mapping[str, Any] | None = None,
        tooltip: str = "",
        ui_color: str = "CornflowerBlue",
        ui_fgcolor: str = "#000",
        add_suffix_on_collision: bool = False,
        doc_md: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise unknown_arguments(f"TaskGroup {group_id!r}", unknown, _ARGUMENTS)
        self._location = user_location()
        self.children: dict[str, BaseOperator | TaskGroup] = {}
        self.prefix_group_id = prefix_group_id
        self.default_args = dict(default_args or {})
        self.group_display_name = group_display_name or None
        self.tooltip = tooltip or (doc_md or "")
        self.doc_md = doc_md
        self.ui_color, self.ui_fgcolor = ui_color, ui_fgcolor
        self.parent_group: TaskGroup | None = None
        self._group_id = group_id
        self.dag: DAG = self._find_dag(dag, parent_group)
        if group_id is None:
            return
        checks.group_identifier(group_id)
        parent = parent_group or blocks.current_group(self.dag)
        assert parent is not None
        self.parent_group = parent
        if add_suffix_on_collision and parent.child_id(group_id) in self.dag.used_ids:
            self._group_id = unique_id(group_id, parent)
        parent._add_group(self)

    def _find_dag(self, dag: DAG | None, parent_group: TaskGroup | None) -> DAG:
        dag = dag or (parent_group.dag if parent_group is not None else blocks.current_dag())
        if dag is None:
            raise refusal(
                f"task group {self._group_id!r} needs a DAG: create it inside `with DAG(...)` or give it dag=..."
            )
        return dag

    @property
    def is_root(self) -> bool:
        """Whether this is the nameless group that holds everything of a DAG."""
        return self._group_id is None

    @property
    def label(self) -> str | None:
        """The id without the prefix of its parents."""
        return self._group_id

    @property
    def group_id(self) -> str | None:
        """The full id, with the prefix of its parents; None for the root group."""
        if self._group_id is None or self.parent_group is None:
            return self._group_id
        return self.parent_group.child_id(self._group_id)

    def child_id(self, label: str) -> str:
        """Return the full id of a member called ``label``."""
        prefix = self._prefix()
        return f"{prefix}.{label}" if prefix else label

    def _prefix(self) -> str | None:
        if self._group_id is None:
            return None
        if self.prefix_group_id:
            return self.group_id
        return self.parent_group._prefix() if self.parent_group is not None else None

    @property
    def inherited_default_args(self) -> dict[str, Any]:
        """The default_args of the groups around and this one, the inner winning."""
        outer = self.parent_group.inherited_default_args if self.parent_group is not None else {}
        return {**outer, **self.default_args}

    def add(self, member: BaseOperator | TaskGroup) -> Any:
        """Add a task to the group, as making it inside the block does."""
        if isinstance(member, TaskGroup):
            raise refusal("give parent_group=... to the inner group instead of adding it")
        self.dag._adopt(member, self)
        return member

    def _add_group(self, group: TaskGroup) -> None:
        group_id = group.group_id
        assert group_id is not None
        if len(group_id) > checks.MAX_ID_LENGTH:
            raise refusal(f"group_id {group_id[:40]!r}... has {len(group_id)} characters with its prefix; at most 250")
        if group_id in self.dag.used_ids:
            raise refusal(
                f"the id {group_id!r} of a task group is already used in DAG {self.dag.dag_id!r}"
                f"{_where(self.dag.used_ids[group_id])}; choose another group_id",
                kind=DuplicateTaskIdError,
            )
        self.dag.used_ids[group_id] = group
        self.dag.task_group_dict[group_id] = group
        self.children[group_id] = group

    # ---- members ----

    def iter_tasks(self) -> Iterator[BaseOperator]:
        """Yield every task of the group, also of groups inside it."""
        for child in self.children.values():
            if isinstance(child, TaskGroup):
                yield from child.iter_tasks()
            else:
                yield child

    def has_task(self, task: BaseOperator) -> bool:
        """Return whether the task lies in the group, however deep."""
        return any(task is member for member in self.iter_tasks())

    def get_child_by_label(self, label: str) -> BaseOperator | TaskGroup:
        """Return the direct member of that id without prefix."""
        return self.children[self.child_id(label)]

    @property
    def roots(self) -> Sequence[BaseOperator]:
        """The tasks with nothing upstream inside the group."""
        tasks = {task.task_id: task for task in self.iter_tasks()}
        return [task for task in tasks.values() if not task.upstream_task_ids & tasks.keys()]

    @property
    def leaves(self) -> Sequence[BaseOperator]:
        """The tasks with nothing downstream inside the group; teardowns stand aside for the work before them."""
        tasks = {task.task_id: task for task in self.iter_tasks()}
        work = {task_id for task_id, task in tasks.items() if not task.is_teardown}
        return [
            tasks[task_id] for task_id in tasks if task_id in work and not tasks[task_id].downstream_task_ids & work
        ]

    def get_roots(self) -> Iterable[BaseOperator]:
        """Return the roots; Airflow's name."""
        return self.roots

    def get_leaves(self) -> Iterable[BaseOperator]:
        """Return the leaves; Airflow's name."""
        return self.leaves

    def expand(self, **kwargs: Any) -> Any:
        """Airflow maps a group here."""
        raise not_supported("mapped task groups (dynamic task mapping)")

    def __enter__(self) -> TaskGroup:
        blocks.enter_group(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        blocks.leave_group()

    def __repr__(self) -> str:
        return f"<TaskGroup: {self.group_id}>"


_ARGUMENTS = (
    "group_id",
    "group_display_name",
    "prefix_group_id",
    "parent_group",
    "dag",
    "default_args",
    "tooltip",
    "ui_color",
    "ui_fgcolor",
    "add_suffix_on_collision",
    "doc_md",
)
_SUFFIX = re.compile(r"__\d+$")


def unique_id(label: str, group: TaskGroup) -> str:
    """Return ``label``, or ``label__1``, ``label__2``, ... so that its full id is free (Airflow's TaskFlow rule)."""
    used, counters = group.dag.used_ids, group.dag.suffixes
    if group.child_id(label) not in used:
        return label
    core = _SUFFIX.sub("", label)
    full = group.child_id(core)
    number = counters.get(full, 0) + 1
    while f"{full}__{number}" in used:
        number += 1
    counters[full] = number  # so that a thousand calls do not look at each other's ids
    return f"{core}__{number}"


def _where(member: object) -> str:
    location = getattr(member, "_location", None)
    return f" ({location})" if location else ""

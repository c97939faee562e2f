"""The planner as one would explain it: everything is looked at from scratch, again and again, until nothing changes.

Slow and plain on purpose; it shares no code with `dflow.core.planner` and `dflow.core.trigger_rules`. Rules read a list
of upstream states instead of counts. A run is a dict from (task_id, map_index) to a state.
"""

from __future__ import annotations

from dflow.core.spec import DagSpec, TaskSpec

Run = dict[tuple[str, int], str]
ENDED = {"success", "failed", "skipped", "upstream_failed", "removed"}
BAD = {"failed", "upstream_failed"}


def outcome(rule: str, upstream: list[tuple[str, bool]]) -> str:
    """Return run, wait, skip or upstream_failed for (state, is_setup) of every direct upstream task instance."""
    states = [state for state, _ in upstream]
    done = all(state in ENDED for state in states)
    kept = [state for state in states if state != "removed"]
    succeeded = states.count("success")
    if not states or rule == "always":
        return "run"
    if rule == "all_success":
        if any(state in BAD for state in states):
            return "upstream_failed"
        if "skipped" in states:
            return "skip"
        return "run" if all(state == "success" for state in kept) else "wait"
    if rule == "all_failed":
        if "success" in states or "skipped" in states:
            return "skip"
        return "run" if all(state in BAD for state in kept) else "wait"
    if rule == "all_done":
        return "run" if done else "wait"
    if rule == "all_done_min_one_success":
        if "skipped" in states:
            return "skip"
        if not done:
            return "wait"
        return "run" if succeeded else "upstream_failed"
    if rule == "all_done_setup_success":
        setups = [state for state, is_setup in upstream if is_setup]
        if not done:
            return "wait"
        if not setups or "success" in setups:
            return "run"
        return "skip" if all(state == "skipped" for state in setups) else "upstream_failed"
    if rule == "one_success":
        if succeeded:
            return "run"
        if not done:
            return "wait"
        return "skip" if all(state == "skipped" for state in states) else "upstream_failed"
    if rule == "one_failed":
        if any(state in BAD for state in states):
            return "run"
        return "skip" if done else "wait"
    if rule == "one_done":
        if "success" in states or "failed" in states:
            return "run"
        return "skip" if done else "wait"
    if rule == "none_failed":
        if any(state in BAD for state in states):
            return "upstream_failed"
        return "run" if done else "wait"
    if rule == "none_failed_min_one_success":
        if any(state in BAD for state in states):
            return "upstream_failed"
        if not done:
            return "wait"
        if succeeded:
            return "run"
        return "skip" if all(state == "skipped" for state in states) else "upstream_failed"
    if rule == "none_skipped":
        if "skipped" in states:
            return "skip"
        return "run" if done else "wait"
    if rule == "all_skipped":
        if any(state in {"success", "failed", "upstream_failed"} for state in states):
            return "skip"
        return "run" if all(state == "skipped" for state in kept) else "wait"
    raise ValueError(rule)


def settle(spec: DagSpec, run: Run) -> Run:
    """Return the run after everything that follows from its states without any task running."""
    run = dict(run)
    tasks = {task.task_id: task for task in spec.tasks}
    if spec.fail_fast and "failed" in run.values():
        for key, state in run.items():
            if state in {"none", "scheduled"} and not tasks[key[0]].is_teardown:
                run[key] = "skipped"
    while True:
        before = dict(run)
        for task in upstream_first(spec):
            upstream = [(state, tasks[t].is_setup) for (t, _), state in run.items() if t in task.upstream]
            for key, state in run.items():
                if key[0] == task.task_id and state == "none":
                    run[key] = follows(task, outcome(task.trigger_rule, upstream))
        if run == before:
            return run


def follows(task: TaskSpec, outcome: str) -> str:
    """Return the state a waiting instance goes to."""
    if outcome == "run":
        return "success" if task.is_empty else "scheduled"
    return {"wait": "none", "skip": "skipped", "upstream_failed": "upstream_failed"}[outcome]


def upstream_first(spec: DagSpec) -> list[TaskSpec]:
    """Return the tasks in an order in which each comes after its upstream."""
    placed: list[TaskSpec] = []
    while len(placed) < len(spec.tasks):
        ids = {task.task_id for task in placed}
        placed += [task for task in spec.tasks if task.task_id not in ids and ids.issuperset(task.upstream)]
    return placed


def run_end(spec: DagSpec, run: Run) -> str | None:
    """Return how a settled run ended, or None if it goes on."""
    if any(state not in ENDED | {"none"} for state in run.values()):
        return None
    if "none" in run.values():
        return "failed"  # deadlock
    ignored = {task.task_id for task in spec.tasks if task.is_teardown and not task.on_failure_fail_dagrun}
    followed = {up for task in spec.tasks if task.task_id not in ignored for up in task.upstream}
    leaves = {task.task_id for task in spec.tasks} - ignored - followed
    if not leaves:
        leaves = {task.task_id for task in spec.tasks} - {up for task in spec.tasks for up in task.upstream}
    return "failed" if any(state in BAD for (t, _), state in run.items() if t in leaves) else "success"

"""A rule-based machine over the planner, the retry rules and a small store, in which everything goes wrong.

The store keeps rows and an inbox as Postgres does; every write is fenced by the expected state and the attempt id.
Two schedulers with cached views, workers, a broker that loses, repeats and reorders, leases that end, and crashes
before a commit and between commit and publish. After every step the invariants of the design hold; at the end every
run ends, in the states the reference model gives for what was accounted.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dflow.core.graph import Graph
from dflow.core.planner import Plan, RunView
from dflow.core.retry import after_infra_loss, after_user_failure
from dflow.core.spec import DagSpec, TaskSpec
from dflow.core.states import ACTIVE, TERMINAL, TaskState, is_legal
from tests.property import reference_planner as reference
from tests.property.strategies import dags

NOW = datetime(2026, 11, 22, tzinfo=UTC)
INFRA_RETRIES = 3
Key = tuple[str, int]
SCHEDULED, QUEUED, RUNNING, RETRY = TaskState.SCHEDULED, TaskState.QUEUED, TaskState.RUNNING, TaskState.UP_FOR_RETRY
ENDS = st.sampled_from([TaskState.SUCCESS, TaskState.SUCCESS, TaskState.FAILED, TaskState.SKIPPED])
PICK = st.integers(0, 10**6)


@dataclass
class Row:
    state: TaskState = TaskState.NONE
    attempt: int | None = None
    user_failures: int = 0
    infra_failures: int = 0
    not_before: float = 0.0


@dataclass
class Store:
    """The tables. A transaction works on a copy that replaces the original when it commits."""

    rows: dict[Key, Row]
    inbox: list[Key] = field(default_factory=list)
    version: int = 0
    attempts: int = 0
    run_state: str = "running"
    started: Counter[int] = field(default_factory=Counter)  # attempt -> claims that succeeded
    finished: Counter[int] = field(default_factory=Counter)  # attempt -> finishes that succeeded
    accounted: list[reference.Run] = field(default_factory=list)  # the ends, pass by pass

    def apply(self, key: Key, from_state: TaskState, to_state: TaskState, attempt: int | None) -> bool:
        """The fenced UPDATE: changes the row, or nothing if it is not where the writer thinks it is."""
        row = self.rows[key]
        if row.state is not from_state or row.attempt != attempt:
            return False
        assert is_legal(from_state, to_state)
        row.state = to_state
        if to_state is SCHEDULED:
            row.attempt = None
        return True

    def states(self) -> reference.Run:
        return {key: row.state.value for key, row in self.rows.items()}


class Machine(RuleBasedStateMachine):
    """One run, two schedulers, any number of workers."""

    @initialize(
        spec=dags(max_tasks=5), sizes=st.lists(st.integers(1, 2), min_size=5, max_size=5), limit=st.integers(1, 3)
    )
    def create_run(self, spec, sizes, limit) -> None:
        self.spec, self.limit, self.clock = spec, limit, 0.0
        self.graph = Graph(spec)
        self.tasks = {task.task_id: task for task in spec.tasks}
        keys = [(t.task_id, i if n > 1 else -1) for t, n in zip(spec.tasks, sizes, strict=False) for i in range(n)]
        self.store = Store(rows={key: Row() for key in keys})
        self.views: list[tuple[int, RunView] | None] = [None, None]  # per scheduler: version, view
        self.messages: list[tuple[Key, int]] = []
        self.processes: list[tuple[Key, int]] = []  # attempts some process works on, fenced or not
        self.ended: dict[Key, TaskState] = {}
        self.a_pass(0)

    # -- the scheduler -------------------------------------------------------------------------------------------

    def a_pass(self, scheduler: int, *, crash: str = "") -> None:
        """One transaction: inbox, plan, apply, admit; then publish. ``crash`` is "before" or "after" its commit."""
        if self.store.run_state != "running":
            return
        before, tx = self.store.states(), deepcopy(self.store)
        ends = {key: tx.rows[key].state.value for key in tx.inbox}
        tx.inbox.clear()
        view, plan = self.planned(scheduler, ends)
        while not self.applied(tx, plan):  # somebody was faster: the view is wrong, the rows are not
            view = RunView(self.graph, [(*key, row.state) for key, row in tx.rows.items()])
            plan = view.plan_all(NOW)
        tx.version += 1
        tx.accounted.append(ends)
        if plan.run_state is not None:
            tx.run_state = plan.run_state.value
        settled = tx.states()
        published = self.admitted(tx)
        if crash == "before":
            self.views[scheduler] = None
            return
        assert settled == self.expected(before, settled)
        assert tx.run_state == (reference.run_end(self.spec, settled) or "running")
        self.store = tx
        self.views[scheduler] = (tx.version, view)
        if crash == "after":
            self.views[scheduler] = None
        else:
            self.messages += published

    def expected(self, before: reference.Run, settled: reference.Run) -> reference.Run:
        """What the reference makes of the rows. fail_fast may leave alone what is scheduled again for a retry."""
        left = {
            key: "scheduled"
            for key, row in self.store.rows.items()
            if row.user_failures + row.infra_failures and before[key] == settled[key] == "scheduled"
        }
        return {**reference.settle(self.spec, {**before, **dict.fromkeys(left, "running")}), **left}

    def planned(self, scheduler: int, ends: reference.Run) -> tuple[RunView, Plan]:
        """Plan with the cached view if nobody else accounted the run meanwhile, else with one made from the rows."""
        cached = self.views[scheduler]
        if cached is not None and cached[0] == self.store.version:
            changes = [(*key, TaskState(state)) for key, state in ends.items()]
            return cached[1], cached[1].plan([*changes, *changes], NOW)
        view = RunView(self.graph, [(*key, row.state) for key, row in self.store.rows.items()])
        return view, view.plan_all(NOW)

    def applied(self, tx: Store, plan: Plan) -> bool:
        done = [tx.apply((d.task_id, d.map_index), d.from_state, d.to_state, None) for d in plan.decisions]
        return all(done)

    def admitted(self, tx: Store) -> list[tuple[Key, int]]:
        """Queue what the limit allows; each gets a new attempt id."""
        nudges = []
        for key in [key for key, row in tx.rows.items() if row.state is SCHEDULED]:
            if sum(row.state in ACTIVE for row in tx.rows.values()) < self.limit:
                assert tx.apply(key, SCHEDULED, QUEUED, None)
                tx.attempts += 1
                tx.rows[key].attempt = tx.attempts
                nudges.append((key, tx.attempts))
        return nudges

    @rule(scheduler=st.integers(0, 1), crash=st.sampled_from(["", "", "", "", "before", "after"]))
    def scheduler_pass(self, scheduler: int, crash: str) -> None:
        self.a_pass(scheduler, crash=crash)

    @precondition(lambda self: any(row.state is QUEUED for row in self.store.rows.values()))
    @rule()
    def publish_again(self) -> None:
        """Rows that were queued and nobody claimed are published once more."""
        self.messages += [(key, row.attempt) for key, row in self.store.rows.items() if row.state is QUEUED]

    @precondition(lambda self: any(row.state is RETRY for row in self.store.rows.values()))
    @rule(seconds=st.sampled_from([1.0, 40.0]))
    def time_passes_and_retries_come_due(self, seconds: float) -> None:
        self.clock += seconds
        for key, row in self.store.rows.items():
            if row.state is RETRY and row.not_before <= self.clock:
                assert self.store.apply(key, RETRY, SCHEDULED, row.attempt)

    # -- broker and workers --------------------------------------------------------------------------------------

    @precondition(lambda self: self.messages)
    @rule(pick=PICK, is_repeated=st.booleans())
    def deliver(self, pick: int, is_repeated: bool) -> None:
        """A message arrives, in any order, perhaps again later; the worker claims its attempt."""
        at = pick % len(self.messages)
        key, attempt = self.messages[at] if is_repeated else self.messages.pop(at)
        if self.store.apply(key, QUEUED, RUNNING, attempt):
            self.store.started[attempt] += 1
            self.processes.append((key, attempt))

    @precondition(lambda self: len(self.messages) > 1)
    @rule()
    def the_broker_is_flushed(self) -> None:
        self.messages.clear()

    @precondition(lambda self: self.processes)
    @rule(pick=PICK, end=ENDS, is_repeated=st.booleans())
    def finish(self, pick: int, end: TaskState, is_repeated: bool) -> None:
        """A process reports its end; perhaps it does so twice, perhaps its attempt is long over."""
        at = pick % len(self.processes)
        key, attempt = self.processes[at] if is_repeated else self.processes.pop(at)
        self.finished(key, attempt, end)

    def finished(self, key: Key, attempt: int, end: TaskState) -> None:
        row, task = self.store.rows[key], self.tasks[key[0]]
        if end is not TaskState.FAILED:
            self.end_attempt(key, attempt, end, 0.0)
            return
        decision = after_user_failure(
            failures=row.user_failures + 1,
            retries=task.retries,
            delay=task.retry_delay_seconds,
            backoff_multiplier=2.0,
            max_delay=30.0,
            seed=str(key),
        )
        if self.end_attempt(key, attempt, decision.to_state, decision.delay_seconds):
            row.user_failures += 1

    @precondition(lambda self: self.processes)
    @rule(pick=PICK)
    def a_lease_is_lost(self, pick: int) -> None:
        """The rescuer takes the attempt back; its process may still be there and report later."""
        key, attempt = self.processes[pick % len(self.processes)]
        row = self.store.rows[key]
        decision = after_infra_loss(losses=row.infra_failures + 1, infra_retries=INFRA_RETRIES, seed=str(key))
        if self.end_attempt(key, attempt, decision.to_state, decision.delay_seconds):
            row.infra_failures += 1

    def end_attempt(self, key: Key, attempt: int, to_state: TaskState, delay: float) -> bool:
        if not self.store.apply(key, RUNNING, to_state, attempt):
            return False
        self.store.finished[attempt] += 1
        self.store.rows[key].not_before = self.clock + delay
        if to_state in TERMINAL:
            self.store.inbox.append(key)
        return True

    # -- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def a_terminal_state_never_changes(self) -> None:
        for key, state in self.ended.items():
            assert self.store.rows[key].state is state
        self.ended = {key: row.state for key, row in self.store.rows.items() if row.state in TERMINAL}

    @invariant()
    def attempts_are_started_and_finished_at_most_once(self) -> None:
        assert all(count == 1 for count in self.store.started.values())
        assert all(count == 1 for count in self.store.finished.values())
        assert self.store.finished.keys() <= self.store.started.keys()

    @invariant()
    def no_two_attempts_of_one_instance_are_live(self) -> None:
        live = self.store.started.keys() - self.store.finished.keys()
        running = {row.attempt for row in self.store.rows.values() if row.state is RUNNING}
        assert live == running

    @invariant()
    def limits_are_kept(self) -> None:
        assert sum(row.state in ACTIVE for row in self.store.rows.values()) <= self.limit
        for key, row in self.store.rows.items():
            assert row.user_failures <= self.tasks[key[0]].retries + 1
            assert row.infra_failures <= INFRA_RETRIES + 1

    @invariant()
    def an_ended_run_has_ended_tasks_only(self) -> None:
        if self.store.run_state != "running":
            assert all(row.state in TERMINAL for row in self.store.rows.values())

    def teardown(self) -> None:
        """Leave the system alone: every run ends, as the reference model says."""
        if not hasattr(self, "store"):
            return
        for _ in range(1000):
            if self.store.run_state != "running":
                break
            self.time_passes_and_retries_come_due(100.0)
            self.a_pass(0)
            self.publish_again()
            while self.messages:
                self.deliver(0, False)
            for key, attempt in [(k, r.attempt) for k, r in self.store.rows.items() if r.state is RUNNING]:
                self.finished(key, attempt, TaskState.SUCCESS)
            self.a_terminal_state_never_changes()
            self.limits_are_kept()
        assert self.store.run_state != "running"
        self.an_ended_run_has_ended_tasks_only()
        if not self.spec.fail_fast:  # what fail_fast skips depends on what had been started, not on outcomes alone
            self.outcomes_lead_to_the_same_end()

    def outcomes_lead_to_the_same_end(self) -> None:
        run: reference.Run = dict.fromkeys(self.store.rows, "none")
        for ends in self.store.accounted:
            run = reference.settle(self.spec, {**run, **ends})
        assert run == self.store.states()
        assert reference.run_end(self.spec, run) == self.store.run_state


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)


# The races the machine must be able to find, played by hand so that each run of the suite has them.


def machine(*tasks: TaskSpec, **more: bool) -> Machine:
    it = Machine()
    it.create_run(spec=DagSpec(dag_id="d", tasks=tasks, **more), sizes=[1] * len(tasks), limit=2)
    return it


def check(it: Machine) -> None:
    it.a_terminal_state_never_changes()
    it.attempts_are_started_and_finished_at_most_once()
    it.no_two_attempts_of_one_instance_are_live()
    it.limits_are_kept()
    it.an_ended_run_has_ended_tasks_only()


def test_a_process_that_lost_its_lease_reports_while_its_successor_runs() -> None:
    it = machine(TaskSpec(task_id="a", operator="X"))
    it.deliver(0, False)
    it.a_lease_is_lost(0)
    it.time_passes_and_retries_come_due(40.0)
    it.a_pass(0)
    it.deliver(0, False)
    (_, first), (_, second) = it.processes
    it.finished(("a", -1), first, TaskState.FAILED)
    check(it)
    assert it.store.rows["a", -1].state is RUNNING
    it.finished(("a", -1), second, TaskState.SUCCESS)
    check(it)
    it.teardown()


def test_one_scheduler_plans_with_what_another_has_not_seen() -> None:
    it = machine(TaskSpec(task_id="a", operator="X"), TaskSpec(task_id="b", operator="X", upstream=("a",)))
    it.deliver(0, False)
    it.finished(("a", -1), 1, TaskState.SUCCESS)
    it.a_pass(1)
    it.deliver(0, False)
    it.finished(("b", -1), 2, TaskState.SUCCESS)
    it.a_pass(0)
    assert it.store.run_state == "success"
    check(it)


def test_fail_fast_skips_a_task_that_was_just_claimed() -> None:
    it = machine(TaskSpec(task_id="a", operator="X"), TaskSpec(task_id="b", operator="X"), fail_fast=True)
    it.deliver(0, False)
    it.deliver(0, False)
    it.finished(("a", -1), 1, TaskState.FAILED)
    it.a_pass(0)
    assert it.store.rows["b", -1].state is RUNNING
    assert it.store.run_state == "running"
    check(it)
    it.teardown()
    assert it.store.run_state == "failed"

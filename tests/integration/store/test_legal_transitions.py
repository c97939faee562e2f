"""The database's table of legal transitions is core's, and its trigger enforces it."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from dflow.core.states import LEGAL_TRANSITIONS, TaskState

from .rows import Rows

pytestmark = pytest.mark.integration
PAIRS = [(one, other) for one in TaskState for other in TaskState if one is not other]


def test_the_table_equals_core(store):
    with store.begin() as tx:
        rows = tx.execute(text("SELECT from_state, to_state FROM legal_transition")).all()
    assert {tuple(row) for row in rows} == {
        (one.value, other.value) for one, others in LEGAL_TRANSITIONS.items() for other in others
    }


def test_the_trigger_lets_pass_exactly_the_legal_ones(store):
    with store.begin() as tx:
        rows = Rows(tx)
        rows.dag()
        run_pk = rows.run()
        for from_state, to_state in PAIRS:
            (ti_id,) = rows.tasks(run_pk, state=from_state.value)
            is_passed = True
            savepoint = tx.begin_nested()
            try:
                tx.execute(text("UPDATE task_instance SET state = :s WHERE id = :i"), {"s": to_state.value, "i": ti_id})
                savepoint.commit()
            except IntegrityError:
                savepoint.rollback()
                is_passed = False
            assert is_passed == (to_state in LEGAL_TRANSITIONS[from_state]), (from_state, to_state)

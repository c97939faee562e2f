"""How Alembic runs our migrations: on the connection `dflow.store.schema` hands over, or as SQL text.

There is no alembic.ini and no metadata to compare with; each revision is SQL written by hand.
"""

from __future__ import annotations

from alembic import context

if context.is_offline_mode():
    # Not the paramstyle of psycopg2, which would double every percent sign.
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"})
    with context.begin_transaction():
        context.run_migrations()
else:
    context.configure(connection=context.config.attributes["connection"])
    with context.begin_transaction():
        context.run_migrations()

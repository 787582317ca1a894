"""Alembic's entry point; `adapters.database` passes the engine in."""

from __future__ import annotations

from alembic import context

from adapters.tables import Table

with context.config.attributes["engine"].begin() as connection:
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
    context.run_migrations()

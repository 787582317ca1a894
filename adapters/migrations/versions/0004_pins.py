"""Pins: the versions that every server keeps in a slot

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Move the schema one revision forward."""
    op.create_table('pins',
    sa.Column('alias', sa.String(length=63), nullable=False),
    sa.Column('number', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('pinned_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('alias', 'number')
    )


def downgrade() -> None:
    """Move the schema one revision back."""
    op.drop_table('pins')

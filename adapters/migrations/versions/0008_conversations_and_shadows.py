"""The log of conversations, and shadows with their answers

Revision ID: 0008
Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Move the schema one revision forward."""
    op.create_table('conversations',
    sa.Column('response_id', sa.String(length=64), nullable=False),
    sa.Column('kept_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('size_bytes', sa.Integer(), nullable=False),
    sa.Column('prompt_sha256', sa.String(length=64), nullable=False),
    sa.Column('messages', sa.JSON(), nullable=False),
    sa.Column('tools', sa.JSON(), nullable=False),
    sa.Column('answers', sa.JSON(), nullable=False),
    sa.ForeignKeyConstraint(['response_id'], ['exposures.response_id'], ),
    sa.PrimaryKeyConstraint('response_id')
    )
    op.create_index('conversations_by_age', 'conversations', ['kept_at', 'size_bytes'], unique=False)
    op.create_table('shadows',
    sa.Column('id', sa.String(length=32), nullable=False),
    sa.Column('alias', sa.String(length=63), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.Column('digest', sa.String(length=64), nullable=False),
    sa.Column('share', sa.Float(), nullable=False),
    sa.Column('state', sa.String(length=16), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('stopped_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('ix_shadows_alias', 'shadows', ['alias'], unique=False)
    op.create_index('one_running_shadow_per_alias', 'shadows', ['alias'], unique=True,
                    sqlite_where=sa.text("state = 'running'"), postgresql_where=sa.text("state = 'running'"))
    op.create_table('shadow_answers',
    sa.Column('response_id', sa.String(length=64), nullable=False),
    sa.Column('shadow_id', sa.String(length=32), nullable=False),
    sa.Column('made_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('outcome', sa.String(length=16), nullable=False),
    sa.Column('reason', sa.String(length=500), nullable=True),
    sa.Column('live_tokens', sa.Integer(), nullable=False),
    sa.Column('live_finish', sa.String(length=32), nullable=False),
    sa.Column('tokens', sa.Integer(), nullable=False),
    sa.Column('finish', sa.String(length=32), nullable=True),
    sa.Column('is_same', sa.Boolean(), nullable=True),
    sa.Column('overlap', sa.Float(), nullable=True),
    sa.Column('answer', sa.JSON(), nullable=True),
    sa.ForeignKeyConstraint(['response_id'], ['exposures.response_id'], ),
    sa.ForeignKeyConstraint(['shadow_id'], ['shadows.id'], ),
    sa.PrimaryKeyConstraint('response_id')
    )
    op.create_index('ix_shadow_answers_shadow_id', 'shadow_answers', ['shadow_id'], unique=False)


def downgrade() -> None:
    """Move the schema one revision back."""
    op.drop_table('shadow_answers')
    op.drop_table('shadows')
    op.drop_table('conversations')

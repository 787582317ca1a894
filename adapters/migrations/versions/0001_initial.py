"""Versions, aliases, experiments, exposures and feedback

Revision ID: 0001
Revises: 
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Move the schema one revision forward."""
    op.create_table('alias_changes',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('alias', sa.String(length=63), nullable=False),
    sa.Column('action', sa.String(length=16), nullable=False),
    sa.Column('from_number', sa.Integer(), nullable=True),
    sa.Column('to_number', sa.Integer(), nullable=False),
    sa.Column('changed_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id')
    )
    with op.batch_alter_table('alias_changes', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_alias_changes_alias'), ['alias'], unique=False)

    op.create_table('aliases',
    sa.Column('name', sa.String(length=63), nullable=False),
    sa.Column('number', sa.Integer(), nullable=True),
    sa.Column('last_number', sa.Integer(), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('name')
    )
    op.create_table('experiments',
    sa.Column('id', sa.String(length=32), nullable=False),
    sa.Column('alias', sa.String(length=63), nullable=False),
    sa.Column('salt', sa.String(length=64), nullable=False),
    sa.Column('state', sa.String(length=16), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('stopped_at', sa.DateTime(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id')
    )
    with op.batch_alter_table('experiments', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_experiments_alias'), ['alias'], unique=False)
        batch_op.create_index('one_running_experiment_per_alias', ['alias'], unique=True, sqlite_where=sa.text("state = 'running'"), postgresql_where=sa.text("state = 'running'"))

    op.create_table('exposures',
    sa.Column('response_id', sa.String(length=64), nullable=False),
    sa.Column('served_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('alias', sa.String(length=63), nullable=False),
    sa.Column('route', sa.String(length=16), nullable=False),
    sa.Column('number', sa.Integer(), nullable=True),
    sa.Column('digest', sa.String(length=64), nullable=True),
    sa.Column('experiment_id', sa.String(length=32), nullable=True),
    sa.Column('arm', sa.String(length=32), nullable=True),
    sa.Column('unit', sa.String(length=64), nullable=False),
    sa.Column('unit_source', sa.String(length=16), nullable=False),
    sa.Column('prompt_tokens', sa.Integer(), nullable=False),
    sa.Column('completion_tokens', sa.Integer(), nullable=False),
    sa.Column('ttft_ms', sa.Float(), nullable=True),
    sa.Column('total_ms', sa.Float(), nullable=False),
    sa.Column('finish_reason', sa.String(length=32), nullable=True),
    sa.Column('error', sa.String(length=500), nullable=True),
    sa.PrimaryKeyConstraint('response_id')
    )
    with op.batch_alter_table('exposures', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_exposures_alias'), ['alias'], unique=False)
        batch_op.create_index(batch_op.f('ix_exposures_experiment_id'), ['experiment_id'], unique=False)

    op.create_table('versions',
    sa.Column('digest', sa.String(length=64), nullable=False),
    sa.Column('base_fingerprint', sa.String(length=64), nullable=False),
    sa.Column('rank', sa.Integer(), nullable=False),
    sa.Column('size_bytes', sa.Integer(), nullable=False),
    sa.Column('source', sa.String(length=16), nullable=False),
    sa.Column('published_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('metrics', sa.JSON(), nullable=False),
    sa.PrimaryKeyConstraint('digest')
    )
    op.create_table('alias_versions',
    sa.Column('alias', sa.String(length=63), nullable=False),
    sa.Column('number', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('digest', sa.String(length=64), nullable=False),
    sa.ForeignKeyConstraint(['digest'], ['versions.digest'], ),
    sa.PrimaryKeyConstraint('alias', 'number')
    )
    with op.batch_alter_table('alias_versions', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_alias_versions_digest'), ['digest'], unique=False)

    op.create_table('arms',
    sa.Column('experiment_id', sa.String(length=32), nullable=False),
    sa.Column('position', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('name', sa.String(length=32), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.Column('digest', sa.String(length=64), nullable=False),
    sa.Column('weight', sa.Float(), nullable=False),
    sa.ForeignKeyConstraint(['experiment_id'], ['experiments.id'], ),
    sa.PrimaryKeyConstraint('experiment_id', 'position')
    )
    op.create_table('feedback',
    sa.Column('response_id', sa.String(length=64), nullable=False),
    sa.Column('metric', sa.String(length=64), nullable=False),
    sa.Column('value', sa.Float(), nullable=False),
    sa.Column('comment', sa.String(length=2000), nullable=True),
    sa.Column('reported_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['response_id'], ['exposures.response_id'], ),
    sa.PrimaryKeyConstraint('response_id', 'metric')
    )


def downgrade() -> None:
    """Move the schema one revision back."""
    op.drop_table('feedback')
    op.drop_table('arms')
    with op.batch_alter_table('alias_versions', schema=None) as batch_op:
        batch_op.drop_index(batch_op.f('ix_alias_versions_digest'))

    op.drop_table('alias_versions')
    op.drop_table('versions')
    with op.batch_alter_table('exposures', schema=None) as batch_op:
        batch_op.drop_index(batch_op.f('ix_exposures_experiment_id'))
        batch_op.drop_index(batch_op.f('ix_exposures_alias'))

    op.drop_table('exposures')
    with op.batch_alter_table('experiments', schema=None) as batch_op:
        batch_op.drop_index('one_running_experiment_per_alias', sqlite_where=sa.text("state = 'running'"), postgresql_where=sa.text("state = 'running'"))
        batch_op.drop_index(batch_op.f('ix_experiments_alias'))

    op.drop_table('experiments')
    op.drop_table('aliases')
    with op.batch_alter_table('alias_changes', schema=None) as batch_op:
        batch_op.drop_index(batch_op.f('ix_alias_changes_alias'))

    op.drop_table('alias_changes')

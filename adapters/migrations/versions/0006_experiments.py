"""Experiments: drafts, stages, plans and decisions; several on one alias; holdouts; what exposures say of their stage

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

from itertools import accumulate, groupby

import sqlalchemy as sa
from alembic import op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Move the schema one revision forward. What runs goes on: all units are in it, each with the arm that it had."""
    # No batches: they copy a table and drop the old one, which foreign keys to it don't allow.
    op.add_column('aliases', sa.Column('holdout', sa.Float(), server_default='0', nullable=False))

    op.drop_index('one_running_experiment_per_alias', 'experiments')
    op.drop_index('ix_experiments_alias', 'experiments')
    op.add_column('experiments', sa.Column('traffic', sa.Float(), server_default='100', nullable=False))
    op.add_column('experiments', sa.Column('stretches', sa.JSON(), nullable=True))
    op.add_column('experiments', sa.Column('stage', sa.Integer(), server_default='1', nullable=False))
    op.add_column('experiments', sa.Column('starts_at', sa.DateTime(timezone=True), nullable=True))
    op.add_column('experiments', sa.Column('ends_at', sa.DateTime(timezone=True), nullable=True))
    op.add_column('experiments', sa.Column('plan', sa.JSON(), server_default='{}', nullable=False))
    op.create_index('experiments_of_alias', 'experiments', ['alias', 'state'], unique=False)
    op.execute("UPDATE experiments SET starts_at = created_at, stretches = '[[0.0, 100.0]]'")

    arms = op.create_table('stage_arms',
    sa.Column('experiment_id', sa.String(length=32), nullable=False),
    sa.Column('stage', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('position', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('name', sa.String(length=32), nullable=False),
    sa.Column('number', sa.Integer(), nullable=False),
    sa.Column('digest', sa.String(length=64), nullable=False),
    sa.Column('weight', sa.Float(), nullable=False),
    sa.Column('stretches', sa.JSON(), nullable=False),
    sa.ForeignKeyConstraint(['experiment_id'], ['experiments.id'], ),
    sa.PrimaryKeyConstraint('experiment_id', 'stage', 'position')
    )
    if rows := _stage_arms():
        op.bulk_insert(arms, rows)
    op.drop_table('arms')

    op.create_table('decisions',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('experiment_id', sa.String(length=32), nullable=False),
    sa.Column('stage', sa.Integer(), nullable=False),
    sa.Column('made_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('action', sa.String(length=32), nullable=False),
    sa.Column('by', sa.String(length=64), nullable=False),
    sa.Column('reason', sa.String(length=1000), nullable=False),
    sa.Column('numbers', sa.JSON(), nullable=False),
    sa.ForeignKeyConstraint(['experiment_id'], ['experiments.id'], ),
    sa.PrimaryKeyConstraint('id')
    )
    op.create_index('ix_decisions_experiment_id', 'decisions', ['experiment_id'], unique=False)

    op.add_column('exposures', sa.Column('stage', sa.Integer(), nullable=True))
    op.add_column('exposures', sa.Column('forced', sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column('exposures', sa.Column('confidence', sa.Float(), nullable=True))
    op.execute('UPDATE exposures SET stage = 1 WHERE experiment_id IS NOT NULL')
    op.drop_index('ix_exposures_experiment_id', 'exposures')
    op.create_index('exposures_of_stage', 'exposures', ['experiment_id', 'stage', 'arm', 'unit'], unique=False)


def _stage_arms() -> list[dict[str, object]]:
    """Every arm with the stretch of positions that was its own: from the weights before it, added up, to its own end."""
    found = op.get_bind().execute(sa.text('SELECT * FROM arms ORDER BY experiment_id, position')).mappings()
    rows: list[dict[str, object]] = []
    for _, group in groupby(found, key=lambda row: row['experiment_id']):
        arms = [dict(row) for row in group]
        uppers = [*accumulate(arm['weight'] for arm in arms)]
        uppers[-1] = 100.0  # but for rounding in the sum
        lows = [0.0, *uppers[:-1]]
        for arm, low, high in zip(arms, lows, uppers, strict=True):
            rows.append({**arm, 'stage': 1, 'stretches': [[low, high]]})
    return rows


def downgrade() -> None:
    """Move the schema one revision back: each experiment keeps the arms of its stage, and gets all units.

    Fails where several run on one alias. Drafts and decided ones become stopped ones.
    """
    op.drop_index('exposures_of_stage', 'exposures')
    op.create_index('ix_exposures_experiment_id', 'exposures', ['experiment_id'], unique=False)
    for column in ('confidence', 'forced', 'stage'):
        op.drop_column('exposures', column)

    op.drop_index('ix_decisions_experiment_id', 'decisions')
    op.drop_table('decisions')

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
    op.execute(
        'INSERT INTO arms SELECT a.experiment_id, a.position, a.name, a.number, a.digest, a.weight '
        'FROM stage_arms a JOIN experiments e ON e.id = a.experiment_id AND e.stage = a.stage'
    )
    op.drop_table('stage_arms')
    op.execute("UPDATE experiments SET state = 'stopped' WHERE state <> 'running'")
    op.drop_index('experiments_of_alias', 'experiments')
    for column in ('plan', 'ends_at', 'starts_at', 'stage', 'stretches', 'traffic'):
        op.drop_column('experiments', column)
    op.create_index('ix_experiments_alias', 'experiments', ['alias'], unique=False)
    op.create_index('one_running_experiment_per_alias', 'experiments', ['alias'], unique=True, sqlite_where=sa.text("state = 'running'"), postgresql_where=sa.text("state = 'running'"))

    op.drop_column('aliases', 'holdout')

"""Jobs: kinds and owners of files, validation, priorities, repeated requests, checkpoints that can be called

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Move the schema one revision forward. Training data that is there already was checked to hold chat rows."""
    # No batches: they copy a table and drop the old one, which the events' foreign keys to jobs don't allow.
    op.add_column('files', sa.Column('kind', sa.String(length=16), nullable=True))
    op.add_column('files', sa.Column('owner', sa.String(length=64), nullable=True))
    op.add_column('files', sa.Column('alias', sa.String(length=63), nullable=True))
    op.execute("UPDATE files SET kind = 'chat' WHERE purpose = 'fine-tune'")
    # Whoever is limited to an alias sees the results of its jobs from before, too.
    op.execute(
        'UPDATE files SET alias = (SELECT MIN(jobs.alias) FROM jobs WHERE jobs.result_file = files.id) '
        "WHERE purpose = 'fine-tune-results'"
    )

    op.add_column('jobs', sa.Column('device', sa.String(length=120), nullable=True))
    # Jobs from before were queued at once.
    op.add_column('jobs', sa.Column('is_validated', sa.Boolean(), server_default=sa.true(), nullable=False))
    op.add_column('jobs', sa.Column('priority', sa.Integer(), server_default='0', nullable=False))
    op.add_column('jobs', sa.Column('start_from', sa.String(length=130), nullable=True))
    op.add_column('jobs', sa.Column('integrations', sa.JSON(), server_default='[]', nullable=False))
    op.add_column('jobs', sa.Column('owner', sa.String(length=64), nullable=True))
    op.add_column('jobs', sa.Column('request_key', sa.String(length=255), nullable=True))
    op.add_column('jobs', sa.Column('request_sha256', sa.String(length=64), nullable=True))
    op.create_index('one_job_per_request', 'jobs', ['owner', 'request_key'], unique=True)

    op.add_column('job_checkpoints', sa.Column('digest', sa.String(length=64), nullable=True))
    op.create_index('ix_job_checkpoints_digest', 'job_checkpoints', ['digest'], unique=False)


def downgrade() -> None:
    """Move the schema one revision back."""
    op.drop_index('ix_job_checkpoints_digest', 'job_checkpoints')
    op.drop_column('job_checkpoints', 'digest')
    op.drop_index('one_job_per_request', 'jobs')
    for column in ('request_sha256', 'request_key', 'owner', 'integrations', 'start_from', 'priority'):
        op.drop_column('jobs', column)
    op.drop_column('jobs', 'is_validated')
    op.drop_column('jobs', 'device')
    for column in ('alias', 'owner', 'kind'):
        op.drop_column('files', column)

"""A PostgreSQL to test on, where the environment names one: POSTGRES_URL=postgresql+psycopg://user@host/database."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import create_engine, text

__all__ = ["POSTGRES_URL", "postgres_schema"]

POSTGRES_URL = os.environ.get("POSTGRES_URL", "")


@contextmanager
def postgres_schema(url: str) -> Iterator[str]:
    """The URL of an empty schema in a PostgreSQL database, which is dropped afterwards."""
    name = f"test_{secrets.token_hex(6)}"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    try:
        yield f"{url}?options=-csearch_path%3D{name}"
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
        engine.dispose()

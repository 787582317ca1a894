"""What all bodies on the wire have in common: strict base classes, and the names and texts that several of them use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

__all__ = ["MAX_CONTENT_CHARS", "FunctionName", "LenientNulls", "Text", "Wire"]

MAX_CONTENT_CHARS = 200_000

Text = Annotated[str, StringConstraints(max_length=MAX_CONTENT_CHARS)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Wire(BaseModel):
    """A body, or a part of one. Unknown fields are errors, and "3" and true are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LenientNulls(Wire):
    """A body in which null means "not given", as in the hosted API; clients send it for what they leave open.

    `unsupported` names fields of the hosted API that are refused with any value but null.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported_nulls(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if item is not None or key not in cls.unsupported}

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        field = cls.model_fields[info.field_name]
        return field.default if value is None and not field.is_required() else value

"""Which base models the engine computes right; importing this loads no model library."""

from __future__ import annotations

from typing import Any

from adapters.errors import BaseModelError

__all__ = ["SUPPORTED_FAMILIES", "check_supported"]

# Families whose outputs are proved against `generate` by the tests. Any other is refused, not served and hoped for.
SUPPORTED_FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
# Rotary embeddings whose frequencies follow the longest sequence at hand: in a batch, somebody else's.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def check_supported(model: Any) -> None:
    """Refuse a base model that is not known to be computed right here.

    Raises:
        BaseModelError: names what was found and what is supported.
    """
    family = model.config.model_type
    if family not in SUPPORTED_FAMILIES:
        known = ", ".join(sorted(SUPPORTED_FAMILIES))
        raise BaseModelError(f"models of type {family!r} are not supported; {known} are")
    for rope in _rope_types(getattr(model.config, "rope_parameters", None) or {}):
        if rope in _BATCH_DEPENDENT_ROPE:
            raise BaseModelError(f"rotary embeddings of type {rope!r} are not supported: they depend on the batch")


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """All types that are named: a model with two kinds of layers has one set of parameters for each kind."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", "default")) for entry in (parameters, *nested)}

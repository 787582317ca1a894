"""Which base models the engine computes right; importing this loads no model library."""

__all__ = ["SUPPORTED_FAMILIES"]

# Families whose outputs are proved against `generate` by the tests. Any other is refused, not served and hoped for.
SUPPORTED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})

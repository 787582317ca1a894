"""The router: which alias a request belongs to when its `model` is `auto`. Knows no HTTP."""

from __future__ import annotations

__all__ = ["ROUTER_FORMAT"]

# Of what is stored, and of what is learned from the same prompts: raised when hashes, features or files change.
ROUTER_FORMAT = 3

"""From HTTP to tokens. Meets training only in the registry and the store."""

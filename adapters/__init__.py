"""The domain core: what a base model, an adapter version, an alias and an experiment are.

Knows no HTTP and no trainer; `server`, `training` and `clients` build on it, never the other way round.
"""

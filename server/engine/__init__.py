"""Continuous batching over one 4-bit base model with different adapters in one batch. Knows no HTTP.

Read `core` for the nouns, then `scheduler.Engine.step`: everything else hangs from it.
"""

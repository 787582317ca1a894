"""The domain core: what a base model, an adapter version, an alias and an experiment are.

Knows no HTTP and no trainer; `server`, `training` and `clients` build on it, never the other way round.
"""

import logging

__all__: list[str] = []


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


# At import bitsandbytes advises to install a package that would fetch kernels from a hub; its own are used here. This
# package is what every process of ours imports first.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_wanted)

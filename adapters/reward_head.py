"""The score head of a reward model: one row of numbers that turns the last hidden state into a reward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import AdapterWeightsError
from adapters.manifest import ADAPTER_WEIGHTS_FILE, REWARD_HEAD_FILE
from adapters.regular_files import read_regular
from adapters.safetensors_file import FLOAT_DTYPES, parse_layout

if TYPE_CHECKING:
    import torch

__all__ = ["REWARD_HEAD_TENSOR", "parse_reward_head", "read_reward_head", "read_reward_head_bytes"]

REWARD_HEAD_TENSOR = "score.weight"
_MAX_HEAD_BYTES = 4 << 20


def read_reward_head_bytes(folder: Path) -> bytearray:
    """The content of a folder's `reward_head.safetensors`.

    Raises:
        AdapterWeightsError: missing, no plain file or too large.
    """
    try:
        return read_regular(folder / REWARD_HEAD_FILE, max_bytes=_MAX_HEAD_BYTES, error=AdapterWeightsError)
    except FileNotFoundError:
        raise AdapterWeightsError(f"{REWARD_HEAD_FILE} is missing: a reward model needs its score head") from None


def read_reward_head(folder: Path, hidden_size: int) -> torch.Tensor:
    """Read and check a folder's `reward_head.safetensors`; see `parse_reward_head`."""
    return parse_reward_head(read_reward_head_bytes(folder), hidden_size)


def parse_reward_head(content: bytearray, hidden_size: int) -> torch.Tensor:
    """The weights in a `reward_head.safetensors`, float32 `[1, hidden_size]`.

    Raises:
        AdapterWeightsError: not safetensors, another tensor than `score.weight`, another shape, or a value that is not
            finite.
    """
    import torch

    try:
        layout = parse_layout(content)
    except AdapterWeightsError as error:  # the parser names the file that it is for otherwise
        raise AdapterWeightsError(str(error).replace(ADAPTER_WEIGHTS_FILE, REWARD_HEAD_FILE)) from None
    found = {entry.name: list(entry.shape) for entry in layout.entries}
    if found != {REWARD_HEAD_TENSOR: [1, hidden_size]}:
        raise AdapterWeightsError(
            f"{REWARD_HEAD_FILE}: expected one tensor {REWARD_HEAD_TENSOR} of shape [1, {hidden_size}], "
            f"found {str(found)!s:.120}"
        )
    entry = layout.entries[0]
    raw = content[layout.data_offset + entry.begin : layout.data_offset + entry.end]
    weight = torch.frombuffer(raw, dtype=getattr(torch, FLOAT_DTYPES[entry.dtype][0])).float().view(1, hidden_size)
    if not weight.isfinite().all():
        raise AdapterWeightsError(f"{REWARD_HEAD_FILE} holds values that are not finite numbers")
    return weight

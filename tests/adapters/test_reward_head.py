"""The score head of a reward model: one tensor of one shape, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from adapters.errors import AdapterWeightsError
from adapters.manifest import REWARD_HEAD_FILE
from adapters.reward_head import parse_reward_head, read_reward_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_is_read_in_float32_when_it_is_right(tmp_path: Path, dtype: torch.dtype) -> None:
    """In whatever precision it was stored."""
    weight = torch.arange(6, dtype=dtype)[None]
    (tmp_path / REWARD_HEAD_FILE).write_bytes(save({"score.weight": weight}))

    head = read_reward_head(tmp_path, 6)

    assert head.dtype == torch.float32
    assert torch.equal(weight.float(), head)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (save({"score.weight": torch.ones(1, 5)}), r"expected one tensor score\.weight of shape \[1, 6\], found .*5"),
        (save({"score.weight": torch.ones(6)}), r"shape \[1, 6\]"),
        (save({"score.bias": torch.ones(1, 6)}), r"score\.bias"),
        (save({"score.weight": torch.ones(1, 6), "other": torch.ones(1)}), r"other"),
        (save({"score.weight": torch.full((1, 6), torch.nan)}), "not finite"),
        (save({"score.weight": torch.full((1, 6), torch.inf)}), "not finite"),
        (b"PK\x03\x04 and so on", r"^reward_head\.safetensors is not a safetensors file: it is a pickle"),
        (b"", r"^reward_head\.safetensors is not a safetensors file"),
    ],
)
def test_head_is_refused_when_it_is_wrong(content: bytes, message: str) -> None:
    """The message names the file and what was found."""
    with pytest.raises(AdapterWeightsError, match=message):
        parse_reward_head(bytearray(content), 6)


def test_head_is_refused_when_it_is_missing(tmp_path: Path) -> None:
    """A reward model without a head is none."""
    with pytest.raises(AdapterWeightsError, match="a reward model needs its score head"):
        read_reward_head(tmp_path, 6)

"""The base model's frozen linear layers as the engine computes them: those with one input joined into one product."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.cextension import lib as bnb_library
from torch import nn
from torch.nn.functional import linear

__all__ = ["FrozenLinear", "can_join"]

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class FrozenLinear:
    """`y = x W^T + bias` for linear layers side by side: `x [tokens, in] -> [tokens, sum of out]`.

    The layers' own weights are moved in here: the layers are of no use afterwards.

    Args:
        layers: Of one kind, plain or bitsandbytes' 4-bit, with the same number of inputs.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.in_features: int = layers[0].in_features
        self.widths = [layer.out_features for layer in layers]
        self.bias = _join_biases(layers)
        self._layer = layers[0] if len(layers) == 1 else _join(layers)
        self._packed: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self._layer.weight.device

    @property
    def num_weights(self) -> int:
        """Weights of the matrix, biases left out."""
        return self.in_features * sum(self.widths)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights as stored; NF4 counts its packed bytes, without the scales (3 to 6 % more)."""
        return self._layer.weight.numel() * self._layer.weight.element_size()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the product; the result is fresh memory, so that callers may add to it in place."""
        if self._packed is not None:
            y = self._packed(x)
            return y if self.bias is None else y.add_(self.bias)
        weight: Any = self._layer.weight
        if not isinstance(self._layer, bnb.nn.Linear4bit):
            return linear(x, weight, self.bias)
        # Straight to the product: the module's own forward costs as much as a small product on a CPU.
        product: torch.Tensor = bnb.matmul_4bit(x, weight, quant_state=weight.quant_state, bias=self.bias)
        return product

    def warm_up(self) -> None:
        """Compute once, on one thread, before any request: bitsandbytes packs weights in place when it first may."""
        if not isinstance(self._layer, bnb.nn.Linear4bit):
            return
        self._layer.eval()
        x = torch.linspace(-1, 1, self.in_features, dtype=self._layer.compute_dtype, device=self.device)[None]
        expected = self._layer(x)
        packed = _packed_product(self._layer)
        # It is not a public function: let another release's meaning of its arguments show here and not in answers.
        if packed is not None and torch.equal(packed(x), expected):
            self._packed = packed


def can_join(layer: nn.Linear) -> bool:
    """Whether a layer's rows can be put beside another's: 4-bit scales must not span the border."""
    if not isinstance(layer, bnb.nn.Linear4bit):
        return True
    return bool(layer.in_features * layer.out_features % layer.weight.quant_state.blocksize == 0)


def _join_biases(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    given = next(layer.bias for layer in layers if layer.bias is not None)
    parts = [given.new_zeros(layer.out_features) if layer.bias is None else layer.bias.data for layer in layers]
    return torch.cat(parts)


def _join(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer without bias that holds the rows of all; the given ones lose their weights."""
    joined: nn.Linear
    if isinstance(layers[0], bnb.nn.Linear4bit):
        joined = _join_4bit(layers)
    else:
        joined = nn.Linear(layers[0].in_features, 1, bias=False, device="meta")
        weight = torch.cat([layer.weight.data for layer in layers])
        joined.weight = nn.Parameter(weight, requires_grad=False)
    for layer in layers:
        del layer.weight
    return joined


def _join_4bit(layers: Sequence[Any]) -> nn.Linear:
    """Rows of 4-bit weights follow one another in memory, and so do their scales: joining them changes no value."""
    states = [layer.weight.quant_state for layer in layers]
    first = states[0]
    assert all(state.shape.numel() % state.blocksize == 0 for state in states), "see can_join"
    state = bnb.functional.QuantState(
        absmax=torch.cat([_plain_scales(state) for state in states]),
        shape=torch.Size((sum(state.shape[0] for state in states), first.shape[1])),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
    )
    data = torch.cat([layer.weight.data.reshape(-1) for layer in layers])[:, None]
    joined: nn.Linear = bnb.nn.Linear4bit(
        first.shape[1],
        state.shape[0],
        bias=False,
        compute_dtype=layers[0].compute_dtype,
        quant_type=first.quant_type,
        device="meta",
    )
    joined.weight = bnb.nn.Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        bnb_quantized=True,
        module=joined,
    )
    vars(joined).update(
        quant_state=state, support_avx512bf16_for_cpu=layers[0].support_avx512bf16_for_cpu, compute_type_is_set=True
    )
    return joined


def _plain_scales(state: Any) -> torch.Tensor:
    """The scales of a weight's blocks, out of the second quantisation if there is one."""
    if not state.nested:
        scales: torch.Tensor = state.absmax
        return scales
    plain: torch.Tensor = bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return plain


def _packed_product(layer: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The CPU product of bitsandbytes on packed weights, without the layers around it; None if it would run another.

    A call through its public functions takes about 15 us more, a third of a decode step with 210 layers at one row.
    """
    state = layer.weight.quant_state
    name = f"gemv_4bit_inference_cpu_{state.quant_type}_bf16"
    handle = getattr(bnb_library, "_lib", None)
    is_packed = getattr(state, "packing_format_for_cpu", False) and layer.compute_dtype == torch.bfloat16
    if not is_packed or not isinstance(handle, ctypes.CDLL) or not hasattr(handle, name):
        return None
    function = handle[name]
    function.argtypes = [_INTEGER] * 3 + [_POINTER] * 4 + [_INTEGER] * 3
    function.restype = None
    weight, scales = layer.weight.data, state.absmax
    num_out, num_in, block = state.shape[0], state.shape[1], state.blocksize

    def product(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16 or x.stride(1) != 1:
            x = x.to(torch.bfloat16).contiguous()
        y = x.new_empty(x.shape[0], num_out)
        function(
            x.shape[0],
            num_out,
            num_in,
            x.data_ptr(),
            weight.data_ptr(),
            scales.data_ptr(),
            y.data_ptr(),
            block,
            x.stride(0),
            num_out,
        )
        return y

    return product

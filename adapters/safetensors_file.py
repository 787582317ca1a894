"""Parses the safetensors format strictly: what stands where in the file, each defect with a message of its own.

The format is eight bytes with the header's length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). The library's reader is not used for adapters because it lets the
last of two tensors of one name win, gives no reason that a user could act on, and copies tensor by tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from adapters.errors import AdapterWeightsError
from adapters.manifest import ADAPTER_WEIGHTS_FILE

__all__ = ["FLOAT_DTYPES", "Layout", "TensorEntry", "parse_layout"]

# Name in the header -> (name in torch, bytes per number).
FLOAT_DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 4 << 20  # 400 tensors take about 50 kB
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its bytes are `data[begin:end]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All tensors in the order of their bytes, which follow one another without gap from `data_offset` to the end."""

    data_offset: int
    entries: list[TensorEntry]


def parse_layout(content: bytearray) -> Layout:
    """Read a file's header and check that it describes every byte behind it exactly once; no number is looked at.

    Raises:
        AdapterWeightsError: not such a file, or a tensor that is not of a floating-point type; says what is wrong.
    """
    length = _header_length(content)
    data_offset = _LENGTH_BYTES + length
    header = _parse_header(bytes(content[_LENGTH_BYTES:data_offset]))
    header.pop("__metadata__", None)
    entries = [_parse_entry(name, entry) for name, entry in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_contiguous(entries, len(content) - data_offset)
    return Layout(data_offset, entries)


def _header_length(content: bytearray) -> int:
    if len(content) < _LENGTH_BYTES:
        raise _not_safetensors(f"it has only {len(content)} bytes")
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    if length > len(content) - _LENGTH_BYTES:
        if _looks_like_pickle(content):
            raise _not_safetensors("it is a pickle under another name, which is never opened")
        raise _not_safetensors(f"its header of {length} bytes would reach beyond its end")
    if length > _MAX_HEADER_BYTES:
        raise _not_safetensors(f"its header has {length} bytes, at most {_MAX_HEADER_BYTES} are read")
    return length


def _looks_like_pickle(content: bytearray) -> bool:
    # torch writes a zip archive with a pickle in it; a bare pickle begins with its protocol's number.
    return content.startswith(b"PK\x03\x04") or (content[0] == 0x80 and 2 <= content[1] <= 5)


def _parse_header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise _not_safetensors(f"its header must hold an object, found {type(header).__name__}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _not_safetensors(f"its header names {twice!r:.120} twice")
    return result


def _parse_entry(name: str, entry: Any) -> TensorEntry:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise _not_safetensors(f"its header describes tensor {name!r:.120} without dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _not_safetensors(f"tensor {name!r:.120} has a shape or offsets that are no sizes")
    if dtype not in FLOAT_DTYPES:
        kinds = ", ".join(FLOAT_DTYPES)
        raise AdapterWeightsError(f"tensor {name!r:.120} has dtype {dtype!r:.20}, not one of {kinds}")
    num_bytes = math.prod(shape) * FLOAT_DTYPES[dtype][1]
    if offsets[1] - offsets[0] != num_bytes:
        raise _not_safetensors(
            f"tensor {name!r:.120} of shape {shape} takes {num_bytes} bytes, its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(type(item) is int and item >= 0 for item in value)


def _check_contiguous(entries: list[TensorEntry], num_bytes: int) -> None:
    position = 0
    for entry in entries:
        if entry.begin < position:
            raise _not_safetensors(f"tensor {entry.name!r:.120} overlaps the one before it")
        if entry.begin > position:
            raise _not_safetensors(f"{entry.begin - position} bytes before tensor {entry.name!r:.120} belong to none")
        position = entry.end
    if position > num_bytes:
        raise _not_safetensors(f"it is cut: its tensors take {position} bytes, {num_bytes} are there")
    if position < num_bytes:
        raise _not_safetensors(f"{num_bytes - position} bytes behind the last tensor belong to none")


def _not_safetensors(reason: str) -> AdapterWeightsError:
    return AdapterWeightsError(f"{ADAPTER_WEIGHTS_FILE} is not a safetensors file: {reason}")

"""A zoo of adapters that must be refused: each entry spoils a good folder in one way and says what is to be told."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapters.errors import (
    AdapterConfigError,
    AdapterManifestError,
    AdapterRejectedError,
    AdapterWeightsError,
    FingerprintMismatchError,
    HotswapError,
    RankTooHighError,
)
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE, BaseReference, Manifest

__all__ = ["ZOO", "BadAdapter"]

_MODULE = "model.layers.0.self_attn.q_proj"
_A = f"base_model.model.{_MODULE}.lora_A.weight"
_B = f"base_model.model.{_MODULE}.lora_B.weight"
_Tensors = dict[str, torch.Tensor]
_Header = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class BadAdapter:
    """One way to be bad.

    Args:
        spoil: Changes a folder with a good adapter of rank 4 and alpha 8 on every linear layer.
        error: What is raised.
        words: A part of the message.
        is_stored: Whether the two files can be put into a store unchecked, so that the engine has to find out.
    """

    spoil: Callable[[Path], object]
    error: type[HotswapError]
    words: str
    is_stored: bool = True


def _config(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / ADAPTER_CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def _raw_config(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / ADAPTER_CONFIG_FILE).write_bytes(content)


def _tensors(change: Callable[[_Tensors], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / ADAPTER_WEIGHTS_FILE)

    return spoil


def _raw_weights(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / ADAPTER_WEIGHTS_FILE
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _header(change: Callable[[_Header], object]) -> Callable[[Path], object]:
    """Change the header and leave the numbers as they are."""

    def rewrite(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        return _with_header(json.dumps(header).encode(), content[8 + length :])

    return _raw_weights(rewrite)


def _with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _twice(content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    entry = json.dumps({_A: json.loads(content[8 : 8 + length])[_A]}).encode()
    return _with_header(entry[:-1] + b", " + content[8 : 8 + length].lstrip(b"{"), content[8 + length :])


def _transpose(tensors: _Tensors) -> None:
    tensors[_A], tensors[_B] = tensors[_A].T.contiguous(), tensors[_B].T.contiguous()


def _rename(old: str, new: str) -> Callable[[_Tensors], object]:
    return lambda tensors: tensors.update({n.replace(old, new): tensors.pop(n) for n in list(tensors) if old in n})


def _raise_rank(folder: Path, rank: int, **config: Any) -> None:
    _config(**config)(folder)
    _tensors(lambda t: t.update({_A: torch.ones(rank, 64), _B: torch.ones(64, rank)}))(folder)


def _overlap(header: _Header) -> None:
    begin, end = header[_B]["data_offsets"]
    header[_B]["data_offsets"] = [begin - 4, end - 4]


def _leave_gap(header: _Header) -> None:
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    last["data_offsets"] = [offset + 4 for offset in last["data_offsets"]]


def _link(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        target = folder.with_name("elsewhere-" + name)
        shutil.move(folder / name, target)
        (folder / name).symlink_to(target.absolute())

    return spoil


def _pipe(folder: Path) -> None:
    (folder / ADAPTER_CONFIG_FILE).unlink()
    os.mkfifo(folder / ADAPTER_CONFIG_FILE)


def _nest_weights(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS_FILE).unlink()
    (folder / ADAPTER_WEIGHTS_FILE).mkdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def _add_program(folder: Path) -> None:
    (folder / "install").write_text("#!/bin/sh\nexit 1\n")
    (folder / "install").chmod(0o755)


def _pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / ADAPTER_WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / ADAPTER_WEIGHTS_FILE).unlink()


def _pickle_in_disguise(folder: Path) -> None:
    _pickle_only(folder)
    (folder / "adapter_model.bin").rename(folder / ADAPTER_WEIGHTS_FILE)


def _manifest(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        reference = BaseReference(name="tiny", fingerprint="a" * 64, quantisation="none")
        made = Manifest(source="trained", base=reference, rank=4, alpha=8, target_modules=["q_proj"])
        (folder / MANIFEST_FILE).write_text(json.dumps({**made.model_dump(), **changes}))

    return spoil


def _fill_with_air(folder: Path) -> None:
    os.truncate(folder / ADAPTER_WEIGHTS_FILE, 1 << 30)


_HUGE_HEADER = _with_header(b"{" + b" " * (5 << 20) + b"}")
_PATH_AS_FILE = {"../../x": {"sha256": "0" * 64, "size_bytes": 1}}

ZOO: dict[str, BadAdapter] = {
    # the base model
    "wrong base": BadAdapter(_manifest(), FingerprintMismatchError, f"with fingerprint {'a' * 64}, but this", False),
    "module that the base lacks": BadAdapter(
        _tensors(_rename("layers.0", "layers.9")),
        AdapterWeightsError,
        "the base model has no linear layer 'model.layers.9",
    ),
    "layer of another width": BadAdapter(
        _tensors(lambda t: t.update({_A: torch.ones(4, 65)})),
        AdapterWeightsError,
        f"{_MODULE}: the base model's layer is 64 -> 64, the adapter's is 65 -> 64",
    ),
    # the tensors
    "missing B": BadAdapter(_tensors(lambda t: t.pop(_B)), AdapterWeightsError, f"{_MODULE} has no lora_B"),
    "missing A": BadAdapter(_tensors(lambda t: t.pop(_A)), AdapterWeightsError, f"{_MODULE} has no lora_A"),
    "NaN": BadAdapter(
        _tensors(lambda t: t[_A][0, 0].fill_(math.nan)),
        AdapterWeightsError,
        f"{_MODULE}: lora_A holds values that are not finite numbers: nan",
    ),
    "infinity": BadAdapter(
        _tensors(lambda t: t[_B][-1, -1].fill_(-math.inf)),
        AdapterWeightsError,
        f"{_MODULE}: lora_B holds values that are not finite numbers: -inf",
    ),
    "overflow by the scaling": BadAdapter(
        _tensors(lambda t: t[_B][0, 0].fill_(3e38)),
        AdapterWeightsError,
        f"{_MODULE}: lora_B overflows torch.float32, the base",
    ),
    "no effect": BadAdapter(
        _tensors(lambda t: [value.zero_() for name, value in t.items() if "lora_B" in name]),
        AdapterWeightsError,
        "every product B A is zero",
    ),
    "no tensors": BadAdapter(_tensors(lambda t: t.clear()), AdapterWeightsError, "the adapter holds no tensors"),
    "transposed": BadAdapter(_tensors(_transpose), AdapterWeightsError, f"{_MODULE}: lora_A and lora_B are transposed"),
    "integers": BadAdapter(
        _tensors(lambda t: t.update({_A: t[_A].int()})), AdapterWeightsError, f"{_A}' has dtype 'I32', not one of F64"
    ),
    "renamed modules": BadAdapter(
        _tensors(_rename("base_model.model.model.layers", "transformer.h")),
        AdapterWeightsError,
        "tensor 'transformer.h.0.mlp.down_proj.lora_A.weight' is not a LoRA weight",
    ),
    "path as a tensor's name": BadAdapter(
        _tensors(lambda t: t.update({"../../etc/passwd": torch.ones(1)})),
        AdapterWeightsError,
        "the name of tensor '../../etc/passwd' is a path",
    ),
    "module that is no target": BadAdapter(
        _config(target_modules=["k_proj"]), AdapterWeightsError, "is not among the config's target_modules"
    ),
    # the rank
    "rank over the cap": BadAdapter(
        lambda folder: (_config(r=17)(folder), _tensors(lambda t: _widen(t, 17))(folder)),
        RankTooHighError,
        "has rank 17, but slots hold at most rank",
    ),
    "rank pattern over the cap": BadAdapter(
        lambda folder: _raise_rank(folder, 33, rank_pattern={f"^{_MODULE}": 33}),
        RankTooHighError,
        f"has rank 33 in rank_pattern['^{_MODULE}'], but",
        is_stored=False,  # the slots know of the highest rank alone
    ),
    "rank of the config is not that of the tensors": BadAdapter(
        _config(r=8), AdapterWeightsError, "expected lora_A [8, in] and lora_B [out, 8], found [4,"
    ),
    # the weights file
    "cut": BadAdapter(_raw_weights(lambda c: c[:-100]), AdapterWeightsError, "it is cut: its tensors take"),
    "empty file": BadAdapter(_raw_weights(lambda c: b""), AdapterWeightsError, "it has only 0 bytes"),
    "header beyond the file": BadAdapter(
        _raw_weights(lambda c: (1 << 40).to_bytes(8, "little") + c[8:]),
        AdapterWeightsError,
        "its header of 1099511627776 bytes would reach beyond its end",
    ),
    "huge header": BadAdapter(
        _raw_weights(lambda c: _HUGE_HEADER), AdapterWeightsError, "its header has 5242882 bytes"
    ),
    "header that is not JSON": BadAdapter(
        _raw_weights(lambda c: c.replace(b'"dtype"', b"'dtype'", 1)), AdapterWeightsError, "its header is not JSON"
    ),
    "header that is a list": BadAdapter(
        _raw_weights(lambda c: _with_header(b"[1, 2]")),
        AdapterWeightsError,
        "its header must hold an object, found list",
    ),
    "header of deep nesting": BadAdapter(
        _raw_weights(lambda c: _with_header(b'{"x":' * 100_000)), AdapterWeightsError, "recursion"
    ),
    "header without a shape": BadAdapter(
        _header(lambda h: h[_A].pop("shape")), AdapterWeightsError, "without dtype, shape and data_offsets alone"
    ),
    "negative shape": BadAdapter(
        _header(lambda h: h[_A].update(shape=[-4, -64])),
        AdapterWeightsError,
        "has a shape or offsets that are no sizes",
    ),
    "shape larger than its bytes": BadAdapter(
        _header(lambda h: h[_A].update(shape=[4, 64000])),
        AdapterWeightsError,
        "takes 1024000 bytes, its offsets span 1024",
    ),
    "overlapping tensors": BadAdapter(_header(_overlap), AdapterWeightsError, "overlaps the one before it"),
    "gap between tensors": BadAdapter(_header(_leave_gap), AdapterWeightsError, "4 bytes before tensor"),
    "bytes behind the tensors": BadAdapter(
        _raw_weights(lambda c: c + b"evil"), AdapterWeightsError, "4 bytes behind the last tensor belong to none"
    ),
    "one tensor twice": BadAdapter(_raw_weights(_twice), AdapterWeightsError, f"its header names '{_A}' twice"),
    "pickle in disguise": BadAdapter(_pickle_in_disguise, AdapterWeightsError, "it is a pickle under another name"),
    "pickle alone": BadAdapter(_pickle_only, AdapterWeightsError, "is missing (other formats are not read)", False),
    "huge file": BadAdapter(_fill_with_air, AdapterWeightsError, "is larger than", False),
    # the config
    "DoRA": BadAdapter(_config(use_dora=True), AdapterConfigError, "use_dora=True is not supported"),
    "bias": BadAdapter(_config(bias="all"), AdapterConfigError, "bias: Input should be 'none', found 'all'"),
    "LoRA bias": BadAdapter(_config(lora_bias=True), AdapterConfigError, "lora_bias=True is not supported"),
    "modules to save": BadAdapter(
        _config(modules_to_save=["lm_head"]), AdapterConfigError, "modules_to_save=['lm_head']"
    ),
    "trained tokens": BadAdapter(
        _config(trainable_token_indices=[1]), AdapterConfigError, "trainable_token_indices=[1]"
    ),
    "replicated layers": BadAdapter(
        _config(layer_replication=[[0, 2]]), AdapterConfigError, "layer_replication=[[0, 2]]"
    ),
    "bare parameters": BadAdapter(_config(target_parameters=["x"]), AdapterConfigError, "target_parameters=['x']"),
    "changed base": BadAdapter(
        _config(init_lora_weights="pissa"), AdapterConfigError, "'pissa' changes the base model"
    ),
    "code to import": BadAdapter(
        _config(auto_mapping={"base_model_class": "X", "parent_library": "evil"}),
        AdapterConfigError,
        "names code to import, which is never done",
    ),
    "unknown key": BadAdapter(_config(use_magic="yes"), AdapterConfigError, "use_magic='yes' is not supported"),
    "other method": BadAdapter(_config(peft_type="IA3"), AdapterConfigError, "peft_type: Input should be 'LORA'"),
    "negative alpha": BadAdapter(
        _config(lora_alpha=-8), AdapterConfigError, "lora_alpha: Input should be greater than 0"
    ),
    "alpha that is no number": BadAdapter(_config(lora_alpha=math.nan), AdapterConfigError, "found nan"),
    "rank of a billion": BadAdapter(
        _config(r=10**9), AdapterConfigError, "r: Input should be less than or equal to 4096"
    ),
    "rank as text": BadAdapter(_config(r="4"), AdapterConfigError, "r: Input should be a valid integer"),
    "pattern that is an expression": BadAdapter(
        _config(rank_pattern={"(a+)+$": 4}), AdapterConfigError, "'(a+)+$' is not the name of a module"
    ),
    "config that is not JSON": BadAdapter(
        _raw_config(b"{'r': 4}"), AdapterConfigError, "adapter_config.json is not JSON"
    ),
    "config that is a list": BadAdapter(_raw_config(b"[]"), AdapterConfigError, "must hold an object, found list"),
    "config without keys": BadAdapter(_raw_config(b"{}"), AdapterConfigError, "Field required"),
    "config with a key twice": BadAdapter(
        _raw_config(b'{"r": 4, "r": 8}'), AdapterConfigError, "adapter_config.json holds the key 'r' twice"
    ),
    "huge config": BadAdapter(_raw_config(b" " * (2 << 20)), AdapterConfigError, "is larger than 1048576 bytes"),
    # the folder
    "empty folder": BadAdapter(_empty, AdapterConfigError, "adapter_config.json is missing", False),
    "file for a folder": BadAdapter(_become_a_file, AdapterConfigError, "is not a folder", False),
    "program beside the weights": BadAdapter(_add_program, AdapterConfigError, "holds a program, 'install'", False),
    "absolute link to weights": BadAdapter(
        _link(ADAPTER_WEIGHTS_FILE), AdapterRejectedError, "adapter_model.safetensors is a symbolic link", False
    ),
    "absolute link to a config": BadAdapter(
        _link(ADAPTER_CONFIG_FILE), AdapterRejectedError, "adapter_config.json is a symbolic link", False
    ),
    "pipe for a config": BadAdapter(_pipe, AdapterRejectedError, "adapter_config.json is not a plain file", False),
    "folder for weights": BadAdapter(
        _nest_weights, AdapterRejectedError, "adapter_model.safetensors is not a plain file", False
    ),
    # the manifest, where the folder brings one
    "path as a file's name": BadAdapter(
        _manifest(files=_PATH_AS_FILE), AdapterManifestError, "manifest.json is not a manifest: files", False
    ),
    "manifest of another format": BadAdapter(
        _manifest(format=9), AdapterManifestError, "manifest.json is not a manifest: format", False
    ),
    "link to a manifest": BadAdapter(
        lambda folder: (_manifest()(folder), _link(MANIFEST_FILE)(folder)),
        AdapterManifestError,
        "manifest.json is a symbolic link",
        False,
    ),
}


def _widen(tensors: _Tensors, rank: int) -> None:
    for name, value in tensors.items():
        tensors[name] = torch.ones(rank, value.shape[1]) if "lora_A" in name else torch.ones(value.shape[0], rank)

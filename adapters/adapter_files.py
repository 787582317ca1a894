"""Reads a LoRA adapter in PEFT's layout, strictly: a schema of our own for the config, safetensors for the weights.

PEFT's own config can name modules to import and options that the engine does not compute; both are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import AdapterConfigError, AdapterWeightsError, RankTooHighError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from adapters.regular_files import read_regular
from adapters.safetensors_file import FLOAT_DTYPES, Layout, TensorEntry, parse_layout

if TYPE_CHECKING:
    import torch

__all__ = [
    "AdapterConfig",
    "AdapterWeights",
    "parse_adapter_config",
    "parse_adapter_weights",
    "read_adapter_config",
    "read_adapter_weights",
    "read_config_bytes",
    "read_weights_bytes",
]

_MAX_CONFIG_BYTES = 1 << 20
_MAX_WEIGHTS_BYTES = 16 << 30  # where the base model's shapes give no closer bound
_MAX_OVERHEAD_BYTES = 8 << 20  # of a weights file, beside its numbers
_MAX_RANK = 4096
_MAX_ALPHA = 65536
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight", re.ASCII)
_PATH_SIGNS = re.compile(r"[/\\\x00]|\.\.")

# PEFT takes the keys of a pattern as regular expressions. Names and layer numbers are what they are used for; an
# expression from outside could take for ever to match.
_PATTERN_KEY = re.compile(r"\^?(?:\w+|\\d\+)(?:\\?\.(?:\w+|\\d\+))*", re.ASCII)
_PATTERN_DOT = re.compile(r"\\?\.")

# Keys of PEFT's LoraConfig that describe or regularise training and leave the result's arithmetic alone.
_HARMLESS_KEYS = frozenset(
    {
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Initialisations that leave the base model's weights as they were.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def _check_pattern_key(key: str) -> str:
    if not _PATTERN_KEY.fullmatch(key):
        raise ValueError(f"{key!r:.120} is not the name of a module, or a path of such names")
    return key


_PatternKey = Annotated[str, AfterValidator(_check_pattern_key)]
_Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=_MAX_ALPHA)]


class AdapterConfig(BaseModel):
    """The part of PEFT's `adapter_config.json` that decides what an adapter computes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Alpha
    target_modules: list[str] | str
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    rank_pattern: dict[_PatternKey, _Rank] = Field(default_factory=dict)
    alpha_pattern: dict[_PatternKey, _Alpha] = Field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """The highest rank that any module may have."""
        return max([self.r, *self.rank_pattern.values()])

    def rank_of(self, module: str) -> int:
        """The rank of one module: the first matching key of the pattern decides, as in PEFT."""
        return next((rank for key, rank in self.rank_pattern.items() if _matches(key, module)), self.r)

    def scaling_of(self, module: str) -> float:
        """Factor of B @ A: alpha / rank (arXiv 2106.09685, section 4.1), or alpha / sqrt(rank) (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = next((value for key, value in self.alpha_pattern.items() if _matches(key, module)), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would give the module an adapter; an expression (a text) is not evaluated and counts as yes."""
        if isinstance(self.target_modules, str):
            return True
        return any(module == target or module.endswith(f".{target}") for target in self.target_modules)

    def check_rank(self, max_rank: int) -> None:
        """Refuse an adapter that no slot can hold.

        Raises:
            RankTooHighError: the rank, or one of the pattern's, exceeds `max_rank`; names both.
        """
        if self.r > max_rank:
            raise RankTooHighError(rank=self.r, max_rank=max_rank)
        for key, rank in self.rank_pattern.items():
            if rank > max_rank:
                raise RankTooHighError(rank=rank, max_rank=max_rank, where=f"rank_pattern[{key!r:.120}]")


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Validated tensors by module path: A `[rank, in_features]`, B `[out_features, rank]` with the scaling in it.

    Modules of a lower rank than the adapter's highest are filled up with zeros, which changes no product.
    """

    rank: int
    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.numel() * tensor.element_size() for pair in self.modules.values() for tensor in pair)


def read_config_bytes(folder: Path) -> bytearray:
    """The content of a folder's `adapter_config.json`.

    Raises:
        AdapterConfigError: missing, no plain file or too large.
    """
    try:
        return read_regular(folder / ADAPTER_CONFIG_FILE, max_bytes=_MAX_CONFIG_BYTES, error=AdapterConfigError)
    except FileNotFoundError:
        raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} is missing") from None


def read_weights_bytes(
    folder: Path, config: AdapterConfig, module_shapes: Mapping[str, tuple[int, int]] | None = None
) -> bytearray:
    """The content of a folder's `adapter_model.safetensors`.

    Raises:
        AdapterWeightsError: missing, no plain file, or larger than any adapter of this config can be.
    """
    limit = _MAX_WEIGHTS_BYTES
    if module_shapes is not None:
        limit = sum(map(sum, module_shapes.values())) * config.max_rank * 8 + _MAX_OVERHEAD_BYTES
    try:
        return read_regular(folder / ADAPTER_WEIGHTS_FILE, max_bytes=limit, error=AdapterWeightsError)
    except FileNotFoundError:
        raise AdapterWeightsError(f"{ADAPTER_WEIGHTS_FILE} is missing (other formats are not read)") from None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Parse a folder's `adapter_config.json` with a strict schema.

    Raises:
        AdapterConfigError: missing, not JSON, or asks for something that the engine does not compute; names the key.
    """
    return parse_adapter_config(read_config_bytes(folder))


def read_adapter_weights(
    folder: Path, config: AdapterConfig, module_shapes: Mapping[str, tuple[int, int]] | None = None
) -> AdapterWeights:
    """Read and check a folder's `adapter_model.safetensors`; see `parse_adapter_weights`."""
    return parse_adapter_weights(read_weights_bytes(folder, config, module_shapes), config, module_shapes)


def parse_adapter_config(content: bytes | bytearray) -> AdapterConfig:
    """Parse the content of an `adapter_config.json`.

    Raises:
        AdapterConfigError: not JSON, or asks for something that the engine does not compute; names the key.
    """
    if len(content) > _MAX_CONFIG_BYTES:
        raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes: {len(content)}")
    try:
        document = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} must hold an object, found {type(document).__name__}")
    return _parse_config(document)


def parse_adapter_weights(
    content: bytearray,
    config: AdapterConfig,
    module_shapes: Mapping[str, tuple[int, int]] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> AdapterWeights:
    """Check the content of an `adapter_model.safetensors` and take the tensors out of it. The content stays as it is.

    Names and shapes are checked before any number is touched. The numbers are converted, checked and cast as one flat
    buffer: operations tensor by tensor would take four times as long.

    Args:
        content: The file.
        config: The parsed config beside it.
        module_shapes: The base model's linear layers, path -> (in_features, out_features); None skips that check.
        dtype: What the tensors are cast to, after the scaling was folded in; None is float32.

    Raises:
        AdapterWeightsError: not safetensors, an unknown tensor, a missing side, a wrong shape or rank, a value that is
            not finite, or no effect at all.
    """
    layout = parse_layout(content)
    pairs = _group_by_module(layout.entries)
    for module, pair in pairs.items():
        _check_pair(module, pair, config, module_shapes)
    tensors = _scaled_tensors(content, layout, pairs, config, dtype)
    rank = max(config.rank_of(module) for module in pairs)
    modules = {
        module: _fill_up(tensors[pair["A"].name], tensors[pair["B"].name], rank) for module, pair in pairs.items()
    }
    if not any(_has_effect(a, b) for a, b in modules.values()):
        raise AdapterWeightsError(
            "every product B A is zero: the adapter has no effect (was it saved before training?)"
        )
    return AdapterWeights(rank, modules)


def _matches(key: str, module: str) -> bool:
    """Whether a pattern's key is the module's path or the end of it; `^` in front asks for the whole path."""
    names, wanted = module.split("."), _PATTERN_DOT.split(key.removeprefix("^"))
    if len(wanted) > len(names) or (key.startswith("^") and len(wanted) != len(names)):
        return False
    tail = names[len(names) - len(wanted) :]
    return all(name == want or (want == r"\d+" and name.isdigit()) for name, want in zip(tail, wanted, strict=True))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} holds the key {key!r:.120} twice")
        result[key] = value
    return result


def _parse_config(document: dict[str, Any]) -> AdapterConfig:
    known = set(AdapterConfig.model_fields)
    initialisation = document.pop("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise AdapterConfigError(
            f"init_lora_weights={initialisation!r:.120} changes the base model and is not supported"
        )
    _check_auto_mapping(document.pop("auto_mapping", None))
    for key in sorted(document.keys() - known - _HARMLESS_KEYS):
        # What is neither understood nor harmless may only hold its neutral value.
        if document[key] not in (None, False, {}, []):
            raise AdapterConfigError(f"{key:.120}={document[key]!r:.120} is not supported")
    given = {key: document[key] for key in known & document.keys()}
    for key in ("rank_pattern", "alpha_pattern"):
        if given.get(key, {}) is None:
            del given[key]
    try:
        return AdapterConfig.model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        raise AdapterConfigError(f"{detail['loc'][0]}: {detail['msg']}, found {detail['input']!r:.80}") from None


def _check_auto_mapping(mapping: Any) -> None:
    """PEFT notes the base model's class and would import its module; nothing is imported here.

    A module outside of transformers is code that came with the model: an adapter that needs it is not for this base.
    """
    if mapping is None or (
        isinstance(mapping, dict)
        and mapping.keys() <= {"base_model_class", "parent_library"}
        and str(mapping.get("parent_library", "transformers")).split(".")[0] == "transformers"
    ):
        return
    raise AdapterConfigError(f"auto_mapping={mapping!r:.120} names code to import, which is never done")


def _group_by_module(entries: list[TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    sides: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        match = _TENSOR_NAME.fullmatch(entry.name)
        if match is None:
            if _PATH_SIGNS.search(entry.name):
                raise AdapterWeightsError(f"the name of tensor {entry.name!r:.120} is a path of files")
            raise AdapterWeightsError(f"tensor {entry.name!r:.120} is not a LoRA weight of a linear layer")
        sides.setdefault(match["module"], {})[match["side"]] = entry
    if not sides:
        raise AdapterWeightsError("the adapter holds no tensors")
    for module, pair in sides.items():
        if missing := {"A", "B"} - pair.keys():
            raise AdapterWeightsError(f"{module:.120} has no lora_{missing.pop()}")
    return sides


def _check_pair(
    module: str,
    pair: Mapping[str, TensorEntry],
    config: AdapterConfig,
    module_shapes: Mapping[str, tuple[int, int]] | None,
) -> None:
    a, b = pair["A"].shape, pair["B"].shape
    rank = config.rank_of(module)
    if len(a) == len(b) == 2 and a[0] != rank and a[1] == b[0] == rank:
        raise AdapterWeightsError(
            f"{module:.120}: lora_A and lora_B are transposed: expected [{rank}, in] and [out, {rank}], "
            f"found {list(a)} and {list(b)}"
        )
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank or 0 in a + b:
        raise AdapterWeightsError(
            f"{module:.120}: expected lora_A [{rank}, in] and lora_B [out, {rank}], found {list(a)} and {list(b)}"
        )
    if module_shapes is not None:
        if module not in module_shapes:
            raise AdapterWeightsError(f"the base model has no linear layer {module!r:.120}")
        if (a[1], b[0]) != module_shapes[module]:
            raise AdapterWeightsError(
                f"{module}: the base model's layer is {module_shapes[module][0]} -> {module_shapes[module][1]}, "
                f"the adapter's is {a[1]} -> {b[0]}"
            )
    if not config.targets(module):
        raise AdapterWeightsError(f"{module:.120} is not among the config's target_modules")


def _scaled_tensors(
    content: bytearray,
    layout: Layout,
    pairs: Mapping[str, Mapping[str, TensorEntry]],
    config: AdapterConfig,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """All tensors by name, the scaling folded into every B in float32, then cast; all of them finite."""
    import torch

    flat = _flatten(content, layout)
    if not _is_finite(flat):
        title = _first_not_finite(layout, flat)
        raise AdapterWeightsError(f"{title} holds values that are not finite numbers: {_first_bad(flat)}")
    cast = flat.to(dtype or torch.float32, copy=True)
    stored, tensors = _split(layout, flat), _split(layout, cast)
    for module, pair in pairs.items():
        name = pair["B"].name
        # From float32 straight into the cast tensor: rounded once.
        torch.mul(stored[name], config.scaling_of(module), out=tensors[name])
    if not _is_finite(cast):
        raise AdapterWeightsError(
            f"{_first_not_finite(layout, cast)} overflows {cast.dtype}, the base model's precision, "
            "when it is scaled by alpha and rank"
        )
    return tensors


def _split(layout: Layout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the single tensors, by name."""
    parts = flat.split([math.prod(entry.shape) for entry in layout.entries])  # type: ignore[no-untyped-call]
    return {entry.name: part.view(entry.shape) for entry, part in zip(layout.entries, parts, strict=True)}


def _flatten(content: bytearray, layout: Layout) -> torch.Tensor:
    """All numbers in the order of the file, in float32: to be read only, since they may lie in `content` itself."""
    import torch

    kinds = {entry.dtype for entry in layout.entries}
    if len(kinds) == 1 and layout.data_offset % 8 == 0:
        stored = torch.frombuffer(
            content, dtype=getattr(torch, FLOAT_DTYPES[kinds.pop()][0]), offset=layout.data_offset
        )
        return stored.float()
    parts = []
    for entry in layout.entries:
        # A slice is a copy that begins at an aligned address.
        raw = content[layout.data_offset + entry.begin : layout.data_offset + entry.end]
        parts.append(torch.frombuffer(raw, dtype=getattr(torch, FLOAT_DTYPES[entry.dtype][0])).float())
    return torch.cat(parts)


def _is_finite(tensor: torch.Tensor) -> bool:
    # Minimum and maximum are NaN if any number is; one pass without a mask, ten times as fast as isfinite().all().
    low, high = tensor.aminmax()
    return math.isfinite(low) and math.isfinite(high)


def _first_not_finite(layout: Layout, flat: torch.Tensor) -> str:
    name = next(name for name, tensor in _split(layout, flat).items() if not _is_finite(tensor))
    match = _TENSOR_NAME.fullmatch(name)
    assert match is not None, "names are checked first"
    return f"{match['module']:.120}: lora_{match['side']}"


def _first_bad(tensor: torch.Tensor) -> float:
    return float(tensor[~tensor.isfinite()][0])


def _fill_up(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = rank - a.shape[0]
    if missing == 0:
        return a, b
    from torch.nn.functional import pad

    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))


def _has_effect(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether any of the rank-one products that B A is the sum of is not zero."""
    return bool((a.any(dim=1) & b.any(dim=0)).any())

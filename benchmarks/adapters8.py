"""Random adapters as PEFT saves them, and a temporary home where they are published.

    python -m benchmarks.adapters8 DIR [--home HOME] [--base BASE] [--count 8]

Speed does not depend on their values. They exist to be loaded by Hotswap and, from DIR, by its peers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters.base_files import pull_base
from adapters.base_model import read_module_shapes
from adapters.database import open_database
from adapters.imports import import_folder
from adapters.manifest import ADAPTER_WEIGHTS_FILE
from adapters.registry import Registry
from adapters.settings import CoreSettings, resolve_home
from adapters.store import ArtifactStore

__all__ = ["RANK", "BenchHome", "PublishedAdapter", "prepared_home", "publish_adapters", "save_adapters"]

RANK = 8
_SPREAD = 0.02  # of A's and B's values: an effect that shows, and activations that stay finite


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """One random adapter under its alias. `num_bytes` is the size of its files."""

    alias: str
    digest: str
    num_bytes: int
    folder: Path


@dataclass(frozen=True, slots=True)
class BenchHome:
    """A temporary home with random adapters; the base model is the user's own."""

    core: CoreSettings
    environment: dict[str, str]
    adapters: tuple[PublishedAdapter, ...]


@contextmanager
def prepared_home(core: CoreSettings, num_adapters: int) -> Iterator[BenchHome]:
    """Make a home for the length of the block: the base models of `core.home`, and random adapters of its own.

    Settings and `HOTSWAP_*` variables of the user have no part in it, so that runs can be compared.
    """
    base_folder = pull_base(core.base, core.home)
    with tempfile.TemporaryDirectory(prefix="hotswap-bench-") as folder:
        home = Path(folder)
        (core.home / "bases").mkdir(parents=True, exist_ok=True)
        (home / "bases").symlink_to((core.home / "bases").resolve())
        own = _settings(core, home, base_folder)
        yield BenchHome(own, _environment(own), publish_adapters(own, num_adapters))


def publish_adapters(core: CoreSettings, count: int) -> tuple[PublishedAdapter, ...]:
    """Make random adapters and publish each under an alias of its own, checked as strictly as any."""
    core.home.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="adapters-", dir=core.home) as folder,
        closing(open_database(core.resolved_database_url)) as database,
    ):
        registry = Registry(database, ArtifactStore(core.home / "store"))
        folders = save_adapters(Path(folder), pull_base(core.base, core.home), count)
        return tuple(_publish(source, core, registry) for source in folders)


def save_adapters(root: Path, base_folder: Path, count: int) -> list[Path]:
    """Write adapters of rank 8 on all linear layers, float32, in folders named as their aliases."""
    from peft import LoraConfig

    shapes = read_module_shapes(base_folder)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in shapes}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base_folder),
        inference_mode=True,
    )
    folders = [root / f"bench-{number:02d}" for number in range(1, count + 1)]
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True)
        config.save_pretrained(str(folder))
        save_file(_random_tensors(shapes, seed), folder / ADAPTER_WEIGHTS_FILE)
    return folders


def main() -> None:
    """Write adapters for peers into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--base", default=None)
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args()
    core = CoreSettings.load(resolve_home(options.home), base=options.base)
    base_folder = pull_base(core.base, core.home)
    print(f"base model: {base_folder}")
    for folder in save_adapters(options.folder, base_folder, options.count):
        print(folder)


def _random_tensors(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (num_in, num_out) in shapes.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, num_in, generator=generator) * _SPREAD
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_out, RANK, generator=generator) * _SPREAD
    return tensors


def _publish(source: Path, core: CoreSettings, registry: Registry) -> PublishedAdapter:
    version, _ = import_folder(source, source.name, core=core, registry=registry)
    digest = version.version.digest
    return PublishedAdapter(source.name, digest, version.version.size_bytes, registry.store.folder(digest))


def _settings(core: CoreSettings, home: Path, base_folder: Path) -> CoreSettings:
    is_local = base_folder.parent != core.home / "bases"
    return CoreSettings.load(
        home,
        base=str(base_folder) if is_local else core.base,
        device=core.device,
        quantisation=core.quantisation,
        max_rank=RANK,
        database_url=f"sqlite:///{home / 'hotswap.db'}",
    )


def _environment(core: CoreSettings) -> dict[str, str]:
    """The environment of a server on this home: the settings, and no other variable of ours."""
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("HOTSWAP_")}
    own = {name: str(value) for name, value in core.model_dump().items()}
    return foreign | {f"HOTSWAP_{name.upper()}": value for name, value in own.items()}


if __name__ == "__main__":
    main()

"""Whether Liger's kernels can be used for a run, before anything heavy is loaded. TRL puts them into the model."""

from __future__ import annotations

from importlib.util import find_spec

from adapters.base_model import pick_device
from adapters.errors import ConfigurationError
from adapters.settings import CoreSettings
from training.config import TrainSettings

__all__ = ["check_liger"]


def check_liger(settings: TrainSettings, core: CoreSettings) -> None:
    """Refuse Liger's kernels where there are none.

    Raises:
        ConfigurationError: the device is no GPU, or the package is not installed; says what to do.
    """
    if not settings.use_liger_kernel:
        return
    if (device := pick_device(core.device)).type != "cuda":
        raise ConfigurationError(
            f"setting train.use_liger_kernel: Liger's kernels run on a GPU alone, and the device is {device.type}; "
            "leave it out"
        )
    if find_spec("liger_kernel") is None:
        raise ConfigurationError(
            "setting train.use_liger_kernel: liger_kernel is not installed; pip install liger-kernel, or leave it out"
        )

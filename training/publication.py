"""From a trained adapter to a published version: written and checked, described, judged by the gate, handed over."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from adapters.adapter_files import read_adapter_config, read_adapter_weights
from adapters.base_model import LoadedBase
from adapters.chat_template import hash_chat_template
from adapters.gate_report import GateReport, may_promote
from adapters.manifest import ADAPTER_CONFIG_FILE, DataReference, Manifest, hash_file
from adapters.records import NumberedVersion
from adapters.registry import Registry
from adapters.reward_head import read_reward_head
from training.config import TrainSettings
from training.evaluation import Yardstick
from training.gate import judge
from training.gate_evidence import PresentVersion, find_present, gather_evidence
from training.losses import Evaluation
from training.methods import TrainingRun
from training.progress import TrainedCounts
from training.rewards_file import public_reward
from training.run_log import PUBLISHING, RunLog
from training.sampling import SamplePrompt
from training.scratch import scratch_folder
from training.start import linear_shapes_of
from training.watching import Best

__all__ = [
    "AdapterSaver",
    "MoveRule",
    "Published",
    "Publisher",
    "StageListener",
    "TrainedAdapter",
    "VersionOpener",
    "describe_version",
    "judge_and_publish",
]

# Where it runs and what becomes of the result, not what it is; the share stands with the data where it was used.
_NOT_RECORDED = {"home", "keep_prompts", "promote", "sample_file", "validation_share"}
_RECORDED_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")

# Writes an adapter into a folder and checks it as strictly as the server; returns its manifest with these metrics.
# Raises AdapterRejectedError: the server would refuse it, for one that has learned nothing so far.
AdapterSaver = Callable[[Path, dict[str, float | None]], Manifest]
# Opens the registry with the versions that settings may name.
VersionOpener = Callable[[], AbstractContextManager[Registry]]
# What may move an alias: asked with the number that it points to when the version is published.
MoveRule = Callable[[int | None], bool]
# Makes the checked adapter in a folder a version, with prompts for the router; returns it, and whether its alias points
# to it.
Publisher = Callable[[Path, Manifest, TrainedCounts, MoveRule, Sequence[str]], tuple[NumberedVersion, bool]]


class StageListener(Protocol):
    """Told how the publication goes on."""

    def on_stage(self, message: str) -> None:
        """A new stage begins."""


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A run behind its last step, with its best state restored.

    Args:
        run: With the model as it is to be published.
        save: Writes the adapter.
        measure: Validates it; None without validation rows.
        before: What that gave before the first step.
        best: The state that is published; None without validation rows.
        counts: Steps and tokens.
        prompts: What the gate has answered.
        asked: What users ask in the training rows, to be kept for the router.
        log: The run's.
        remark: What its validation losses say of it, in a sentence (`training/alarms.py: find_remark`).
    """

    run: TrainingRun[Any]
    save: AdapterSaver
    measure: Callable[[], Evaluation] | None
    before: Evaluation | None
    best: Best | None
    counts: TrainedCounts
    prompts: Sequence[SamplePrompt]
    asked: Sequence[str]
    log: RunLog
    remark: str | None


@dataclass(frozen=True, slots=True)
class Published:
    """The version that was made, whether its alias points to it, and what the gate found."""

    version: NumberedVersion
    is_live: bool
    gate: GateReport


def judge_and_publish(
    trained: TrainedAdapter, alias: str, *, open_versions: VersionOpener, publish: Publisher, listener: StageListener
) -> Published:
    """Write the adapter, have the gate look at it, and hand it to `publish`.

    Raises:
        AdapterRejectedError: the server would refuse it.
    """
    run, log = trained.run, trained.log
    with scratch_folder(log.folder) as folder:
        manifest = trained.save(folder, _metrics_of(trained.before, trained.best, trained.counts))
        listener.on_stage("Checking the version against the gate")
        present = find_present(open_versions, alias, run)
        report = _find_report(present, manifest, folder) or _judge(trained, present)
        log.note("gate", trained.counts.num_steps, {"verdict": report.verdict, "reason": report.reason})
        listener.on_stage(PUBLISHING)
        judged = manifest.model_copy(update={"gate": report})
        may_move = _move_rule(run.settings, report, present)
        published, is_live = publish(folder, judged, trained.counts, may_move, trained.asked)
    return Published(published, is_live, report)


def describe_version(
    folder: Path,
    base: LoadedBase,
    data: DataReference,
    settings: TrainSettings,
    metrics: dict[str, float | None],
    *,
    parent: str | None,
) -> Manifest:
    """Check what was saved as strictly as the server will, and write down where it comes from.

    Raises:
        AdapterRejectedError: the server would refuse it.
    """
    _sort_target_modules(folder / ADAPTER_CONFIG_FILE)
    config = read_adapter_config(folder)
    weights = read_adapter_weights(folder, config, linear_shapes_of(base))
    is_reward_model = settings.method == "reward"
    if is_reward_model:
        read_reward_head(folder, base.model.config.get_text_config().hidden_size)
    return Manifest(
        source="trained",
        kind="reward" if is_reward_model else "chat",
        method=settings.method,
        parent=parent,
        base=base.reference,
        rank=config.r,
        alpha=config.lora_alpha,
        target_modules=sorted({module.rsplit(".", 1)[-1] for module in weights.modules}),
        data=data,
        settings=settings.model_dump(mode="json", exclude=_NOT_RECORDED) | {"reward": public_reward(settings.reward)},
        metrics=metrics,
        chat_template_sha256=hash_chat_template(base.tokenizer),
        libraries={name: version(name) for name in _RECORDED_LIBRARIES} | {"python": platform.python_version()},
    )


def _judge(trained: TrainedAdapter, present: PresentVersion | None) -> GateReport:
    run, before = trained.run, trained.before
    yardstick = Yardstick(run, trained.measure, before) if trained.measure and before else None
    candidate = trained.best.evaluation if trained.best else None
    evidence = gather_evidence(run, yardstick, candidate=candidate, present=present, prompts=trained.prompts)
    return judge(evidence, run.settings)


def _find_report(present: PresentVersion | None, manifest: Manifest, folder: Path) -> GateReport | None:
    """The report of what the alias answers with already, if that is this version: published again, it stays the same.

    Equal in all that is recorded, not in its bytes alone: under other settings of the gate they are judged again.
    """
    known = present.manifest if present else None
    if known is None or any(hash_file(folder / name) != file.sha256 for name, file in known.files.items()):
        return None
    same = manifest.model_copy(update={"files": known.files, "gate": known.gate})
    return known.gate if same.digest == known.digest else None


def _move_rule(settings: TrainSettings, report: GateReport, present: PresentVersion | None) -> MoveRule:
    """With the gate, the alias moves only from where it pointed to when the gate compared."""
    compared = present.version.number if present else None

    def may_move(number: int | None) -> bool:
        return may_promote(settings.promote, report) and (settings.promote == "always" or number == compared)

    return may_move


def _metrics_of(before: Evaluation | None, best: Best | None, counts: TrainedCounts) -> dict[str, float | None]:
    after = best.evaluation if best else None
    metrics: dict[str, float | None] = {
        "validation_loss_before": before.loss if before else None,
        "validation_loss_after": after.loss if after else None,
        "validation_accuracy_after": after.accuracy if after else None,
    }
    for when, found in (("before", before), ("after", after)):
        metrics |= {f"validation_{name}_{when}": value for name, value in (found.extra if found else {}).items()}
    return metrics | {"num_steps": counts.num_steps, "best_step": best.step if best else None}


def _sort_target_modules(config_path: Path) -> None:
    # PEFT writes them in the order of a set: equal runs would get different names.
    document = json.loads(config_path.read_bytes())
    document["target_modules"] = sorted(document["target_modules"])
    config_path.write_text(json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")

"""`hotswap shadow loss`: how well a candidate would have given the live answers, beside what gave them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clients.cli.options import BaseOption, DeviceOption, HomeOption, JsonOption, load_core, open_registry
from clients.cli.output import console, print_json

if TYPE_CHECKING:
    from adapters.comparisons import PairedComparison
    from adapters.registry import Registry
    from adapters.shadows import ShadowPair

__all__ = ["ShadowArgument", "loss"]

ShadowArgument = Annotated[str, typer.Argument(help="A shadow's id, or its alias.")]


def loss(
    name: ShadowArgument,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many kept pairs at most, the newest ones.")] = 200,
    home: HomeOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """The loss of the live answers under the candidate, and under what gave them; this loads the base model."""
    from adapters.comparisons import compare_pair
    from adapters.errors import NotFoundError
    from adapters.shadows import ShadowService

    service = ShadowService(open_registry(home).database)
    pairs, candidate = service.pairs(name, limit=limit), service.get(name).label
    found = _measure_losses(candidate, pairs, home, base, device) if pairs else []
    if not found:
        raise NotFoundError("no live answers are kept whose loss could be measured; hotswap serve --keep-conversations")
    # The lower loss wins.
    scores = [(-ours, -live) for _, ours, live in found]
    compared = compare_pair("shadow", "live", scores, [pair.unit for pair, _, _ in found])
    means = [-sum(side) / len(found) for side in zip(*scores, strict=True)]
    num_left_out = len(pairs) - len(found)
    if json:
        print_json({"shadow_loss": means[0], "live_loss": means[1], "num_left_out": num_left_out, "compared": compared})
    else:
        _print_losses(candidate, means, compared, num_left_out)


def _measure_losses(
    candidate: str, pairs: Sequence[ShadowPair], home: Path | None, base: str | None, device: str | None
) -> list[tuple[ShadowPair, float, float]]:
    """Of each live answer that can be measured its loss under the candidate, and under the version that gave it."""
    from adapters.base_model import load_base
    from training.answer_loss import measure_answers, render_answer
    from training.config import TrainSettings

    core = load_core(home, base=base, device=device)
    settings = TrainSettings.load(core.home)
    registry = open_registry(home)
    pairs = _still_published(registry, pairs)
    if not pairs:
        return []
    loaded = load_base(core)
    longest = settings.max_length
    rendered = [(pair, render_answer(loaded, [*pair.messages, pair.live], pair.tools, longest)) for pair in pairs]
    kept = [(pair, row) for pair, row in rendered if row is not None]
    if not kept:
        return []
    rows = {candidate: [row for _, row in kept]}
    for pair, row in kept:  # none of them is the candidate's own: what it answers is not copied
        rows.setdefault(pair.live_version, []).append(row)
    losses = measure_answers(registry, loaded, settings, rows)
    live = {version: iter(values) for version, values in losses.items()}
    return [(pair, next(live[candidate]), next(live[pair.live_version])) for pair, _ in kept]


def _still_published(registry: Registry, pairs: Sequence[ShadowPair]) -> list[ShadowPair]:
    """The pairs whose live answer is of a version that is there, or of the base model."""
    from adapters.errors import NotFoundError
    from adapters.records import BASE_MODEL_NAME

    found: dict[str, bool] = {BASE_MODEL_NAME: True}
    for label in {pair.live_version for pair in pairs} - {BASE_MODEL_NAME}:
        try:
            found[label] = registry.find(label).label == label
        except NotFoundError:
            found[label] = False
    return [pair for pair in pairs if found[pair.live_version]]


def _print_losses(candidate: str, means: Sequence[float], found: PairedComparison, num_left_out: int) -> None:
    interval = found.difference
    bounds = "" if interval is None else f" ({-interval.high:.3f} to {-interval.low:.3f})"
    console.print(
        f"loss of {found.num_prompts} live answers to {found.num_units} users, in nats a token: {candidate} "
        f"{means[0]:.3f}, what gave them {means[1]:.3f}; difference {-found.mean_difference:+.3f}{bounds}: one look",
        markup=False,
        soft_wrap=True,
    )
    if num_left_out:
        console.print(
            f"left out: {num_left_out}, too long, not as the chat template wants it, or of a version that is gone"
        )
    console.print(
        "What gave an answer is at an advantage with it: a higher loss says how far the candidate is from what is "
        "served, not that it is worse.",
        style="dim",
        soft_wrap=True,
    )

"""The loss of given answers under published versions, against the models as PEFT computes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters.registry import Registry
from tests.support.engine import RECIPES, save_recipes
from tests.support.tiny import load_tiny_base, make_manifest
from training.answer_loss import measure_answers, render_answer
from training.config import TrainSettings

NAMES = list(RECIPES)[:2]
MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "earlier"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "the answer"},
]


def test_loss_is_that_of_the_answer_alone_under_each_version_when_measured(
    registry: Registry, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of two versions and the base, in any order of rows; the earlier answer carries none."""
    folder = tiny_folders["llama"]
    base, adapters = load_tiny_base(folder), save_recipes(tmp_path, folder)
    for name in NAMES:
        recipe = RECIPES[name]
        manifest = make_manifest(base.reference, rank=recipe.rank, alpha=recipe.alpha)
        registry.publish(adapters[name], manifest, alias="legal")
    rows = [render_answer(base, MESSAGES, [], max_length=200), render_answer(base, MESSAGES[:2], [], max_length=200)]
    long, short = rows
    assert long is not None
    assert short is not None
    settings = TrainSettings.load(tmp_path, batch_size=2)
    asked = {"legal@v2": [long, short], "legal@v1": [short], "base": [long]}
    found = measure_answers(registry, base, settings, asked)

    def expected(version: int | None, row: object) -> float:
        model = load_tiny_base(folder).model
        if version is not None:
            model = PeftModel.from_pretrained(model, adapters[NAMES[version - 1]])
        ids = torch.tensor([row.input_ids])  # type: ignore[attr-defined]
        with torch.no_grad():
            guesses = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        wanted = torch.tensor(row.loss_mask[1:])  # type: ignore[attr-defined]
        return float(-guesses.gather(1, ids[0, 1:, None])[:, 0][wanted].mean())

    assert [expected(2, long), expected(2, short)] == pytest.approx(found["legal@v2"], rel=1e-4)
    assert [expected(1, short)] == pytest.approx(found["legal@v1"], rel=1e-4)
    assert [expected(None, long)] == pytest.approx(found["base"], rel=1e-4)
    assert sum(long.loss_mask) == len("the answer") + 1  # a token a byte, and the end of the turn


def test_answer_is_left_out_when_it_can_not_be_measured(tiny_folders: dict[str, Path]) -> None:
    """Too long for training, or no conversation that training would take."""
    base = load_tiny_base(tiny_folders["llama"])
    assert render_answer(base, MESSAGES, [], max_length=10) is None
    assert render_answer(base, MESSAGES[:1], [], max_length=200) is None

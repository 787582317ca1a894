"""`hotswap shadow` in process, over answers that a server would have written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.conversations import Conversation, ConversationLog
from adapters.errors import ConflictError, NotFoundError
from adapters.experiments import ExperimentService
from adapters.records import Binding, Exposure
from adapters.registry import Registry
from adapters.shadows import ShadowAnswer, ShadowService
from adapters.tables import ExposureRow
from clients.cli.main import app
from tests.support.chat_endpoint import chat_endpoint
from tests.support.engine import RECIPES, save_recipes
from tests.support.tiny import load_tiny_base, make_manifest
from tests.support.versions import publish_text


def _run(home: Path, *arguments: str) -> str:
    environment = {"HOTSWAP_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1", "HOTSWAP_QUANTISATION": "none"}
    result = CliRunner().invoke(app, ["shadow", *arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert 0 == result.exit_code, result.output
    return result.stdout


def _answer(
    registry: Registry, shadow_id: str, number: int, live: str, shadow: str, *, keep: bool = True, unit: str = "u"
) -> None:
    name = f"chatcmpl-{number}"
    binding = Binding("legal", "alias", "d" * 64, 1)
    ExperimentService(registry.database).record_exposure(
        Exposure(name, binding, unit, "user", 5, 7, 1.5, 9.5, "stop", None)
    )
    sides = [{"role": "assistant", "content": text} for text in (live, shadow)]
    if keep:
        question = {"role": "user", "content": "q"}
        assert ConversationLog(registry.database).keep(Conversation(name, [question], [], sides[:1]))
    ShadowService(registry.database).record(
        ShadowAnswer(name, shadow_id, "answered", None, len(live), "stop", len(shadow), "stop", sides[0], sides[1])
    )


@pytest.fixture
def shadow_id(tmp_path: Path, registry: Registry) -> str:
    """A shadow that runs on `legal`."""
    for content in ("one", "two"):
        publish_text(registry, content)
    return str(json.loads(_run(tmp_path, "start", "legal", "--version", "v1", "--share", "5", "--json"))["id"])


def test_shadow_is_started_listed_and_stopped_when_asked(tmp_path: Path, shadow_id: str) -> None:
    """By its id or its alias."""
    assert [shadow_id] == [item["id"] for item in json.loads(_run(tmp_path, "list", "--json"))]
    assert "5 %" in _run(tmp_path, "list")
    with pytest.raises(ConflictError, match="runs on 'legal' already"):
        _run(tmp_path, "start", "legal", "--version", "v2")
    assert f"{shadow_id} is stopped" in _run(tmp_path, "stop", "legal")
    assert "there is nothing to compare" in _run(tmp_path, "show", shadow_id)


def test_show_compares_both_answers_when_there_are_some(tmp_path: Path, registry: Registry, shadow_id: str) -> None:
    """Shares, lengths, users and what was dropped."""
    _answer(registry, shadow_id, 1, "same words", "same words")
    _answer(registry, shadow_id, 2, "short", "a longer one")
    _answer(registry, shadow_id, 3, "gone", "gone", keep=False)
    _answer(registry, shadow_id, 4, "x", "yy")
    shown = _run(tmp_path, "show", "legal")
    for expected in ("50.0%", "tokens, shadow minus live", "+2.00", "too few users", "texts kept"):
        assert expected in shown
    assert re.search(r"cut at the limit in points.*\+0\.0", shown, re.DOTALL)
    report = json.loads(_run(tmp_path, "show", "legal", "--json"))["report"]
    assert (4, 3, 1) == (report["num_answered"], report["num_kept"], report["num_units"])


def test_interval_is_told_in_percent_when_the_mean_is(tmp_path: Path, registry: Registry, shadow_id: str) -> None:
    """A share beside the ends of its interval, all three alike."""
    for number in range(30):
        _answer(registry, shadow_id, number, "x", "x" if number % 2 else "y", unit=f"user-{number}")
    shown = _run(tmp_path, "show", "legal")
    assert re.search(r"50\.0% +│ +\d+\.\d% to \d+\.\d%", shown)


def test_function_judges_the_pairs_whose_text_is_kept_when_asked(
    tmp_path: Path, registry: Registry, shadow_id: str
) -> None:
    """As it judges a replay; the newest so many."""
    for number, (live, shadow) in enumerate([("same words", "same words"), ("short", "a longer one"), ("x", "yy")]):
        _answer(registry, shadow_id, number, live, shadow)
    _answer(registry, shadow_id, 9, "gone", "gone", keep=False)
    judge = tmp_path / "judges.py"
    judge.write_text("def short(completions, prompts, references):\n    return [-len(text) for text in completions]\n")
    command = ("judge", "legal", "--judge", f"{judge}:short")
    judged = json.loads(_run(tmp_path, *command, "--json"))["judged"]
    assert (3, 1, 0, 1, 2) == tuple(judged[name] for name in ("num_prompts", "num_units", "wins", "ties", "losses"))
    assert "the shadow won 0, tied 1, lost 2 of 3 pairs of 1 users" in _run(tmp_path, *command)
    assert "lost 1 of 1 pairs" in _run(tmp_path, *command, "--limit", "1")


def test_model_judges_both_orders_when_it_is_named(tmp_path: Path, registry: Registry, shadow_id: str) -> None:
    """Equal answers are a tie without asking, and with a journal nothing is asked twice."""
    for number, (live, shadow) in enumerate([("same", "same"), ("poor", "splendid"), ("splendid", "poor")]):
        _answer(registry, shadow_id, number, live, shadow)
    says = lambda body: "12"[(text := body["messages"][-1]["content"]).index("poor") < text.index("splendid")]  # noqa: E731
    with chat_endpoint(says) as judging:
        command = ("judge", "legal", "--judge", "some-judge", "--judge-url", f"{judging.url}/v1", "--criterion", "tone")
        for _ in range(2):
            found = json.loads(_run(tmp_path, *command, "--journal", str(tmp_path / "verdicts.jsonl"), "--json"))
        assert 4 == len(judging.bodies)
        assert "tone" in judging.bodies[0]["messages"][0]["content"]
        assert "3 pairs were shown in both orders" in _run(tmp_path, *command)
        assert 8 == len(judging.bodies)
    judged = found["judged"]
    assert (1, 1, 1) == (judged["wins"], judged["ties"], judged["losses"])
    assert 0 == found["position_bias"]["first_place_won_both"]


@pytest.fixture
def measuring(tmp_path: Path, registry: Registry, tiny_folders: dict[str, Path]) -> tuple[str, ...]:
    """The command that measures three kept answers of `legal@v1` under `legal@v2`, whose shadow runs."""
    base, adapters = load_tiny_base(tiny_folders["llama"]), save_recipes(tmp_path / "a", tiny_folders["llama"])
    for name, recipe in list(RECIPES.items())[:2]:
        manifest = make_manifest(base.reference, rank=recipe.rank, alpha=recipe.alpha)
        registry.publish(adapters[name], manifest, alias="legal")
    shadow = ShadowService(registry.database).start("legal", "v2", share=5)
    for number in range(3):
        _answer(registry, shadow.id, number, f"live {number}", "another")
    return "loss", "legal", "--base", str(tiny_folders["llama"]), "--device", "cpu"


def test_loss_is_measured_when_answers_are_kept(tmp_path: Path, measuring: tuple[str, ...]) -> None:
    """Of each kept live answer under the candidate and under what gave it; the same version twice is no difference."""
    found = json.loads(_run(tmp_path, *measuring, "--json"))
    assert (0, 3) == (found["num_left_out"], found["compared"]["num_prompts"])
    difference = found["live_loss"] - found["shadow_loss"]  # a win is the lower loss
    assert difference == pytest.approx(found["compared"]["mean_difference"])
    assert difference != 0
    assert "loss of 3 live answers to 1 users" in _run(tmp_path, *measuring)


def test_loss_leaves_answers_out_when_their_version_is_gone(
    tmp_path: Path, registry: Registry, measuring: tuple[str, ...]
) -> None:
    """The base model's answer is measured all the same, and the others are counted."""
    with registry.database.write() as session:
        session.get_one(ExposureRow, "chatcmpl-0").number = None
    registry.remove("legal@v1")
    found = json.loads(_run(tmp_path, *measuring, "--json"))
    assert (2, 1) == (found["num_left_out"], found["compared"]["num_prompts"])


def test_judge_says_how_texts_are_kept_when_there_are_none_to_judge(
    tmp_path: Path, registry: Registry, shadow_id: str
) -> None:
    """Numbers are there without them."""
    _answer(registry, shadow_id, 1, "a", "b", keep=False)
    with pytest.raises(NotFoundError, match="--keep-conversations"):
        _run(tmp_path, "judge", "legal", "--judge", "judges.py:short")

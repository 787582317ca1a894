"""The learned router: topics by their words, no answer far from all of them, the same bytes from the same prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from adapters.errors import IntegrityError
from adapters.routing.embeddings import TokenEmbeddings, open_embeddings
from adapters.routing.model import RouterModel
from adapters.routing.prompts import group_labelled, read_background, read_labelled
from adapters.routing.training import train_router
from tests.support.routing import ABOUT_BREAD, ABOUT_LEASE, ABOUT_NOTHING, NOTHING, PROMPTS


@pytest.fixture(scope="module")
def model() -> RouterModel:
    """A router of three domains."""
    return train_router(PROMPTS, NOTHING)


def test_unseen_texts_get_their_alias_when_scored(model: RouterModel) -> None:
    """By the words that they share with an alias's prompts."""
    lease, bread = model.score([ABOUT_LEASE, ABOUT_BREAD])
    assert "legal" == model.aliases[int(lease.probabilities.argmax())]
    assert "cooking" == model.aliases[int(bread.probabilities.argmax())]
    assert lease.probabilities.max() > 0.5
    assert bread.probabilities.max() > 0.5


def test_no_alias_is_likely_when_a_text_is_far_from_all(model: RouterModel) -> None:
    """Unknown words, general texts and no words at all; what is left belongs to none."""
    for text in (ABOUT_NOTHING, "tell me a joke about the moon", "", "?!"):
        (scores,) = model.score([text])
        assert scores.probabilities.max() < 0.5, text
        assert scores.none == pytest.approx(1 - float(scores.probabilities.sum()), abs=1e-6)


def test_probabilities_stay_the_same_when_a_text_is_shouted(model: RouterModel) -> None:
    """Case is no topic."""
    quiet, loud = model.score([ABOUT_LEASE, ABOUT_LEASE.upper()])
    assert quiet.probabilities.tolist() == loud.probabilities.tolist()


def test_template_decides_nothing_when_each_alias_has_its_own() -> None:
    """Trained on prompts that their form alone tells apart, a text in another alias's form still goes by its topic."""
    framed = {
        alias: [f"answer as the {alias} desk would : {prompt} . reply in short {alias} words" for prompt in prompts]
        for alias, prompts in PROMPTS.items()
    }
    model = train_router(framed, NOTHING)
    (scores,) = model.score([f"Answer as the music desk would: {ABOUT_LEASE}. Reply in short music words"])
    assert "legal" == model.aliases[int(scores.probabilities.argmax())]
    assert scores.probabilities.max() > 0.5


def test_nearest_prompts_come_first_when_asked_for(model: RouterModel) -> None:
    """Each with its place among the prompts of its alias."""
    first, *others = model.nearest("may my landlord keep the deposit?", 4)
    assert ("legal", 0) == (first.alias, first.position)
    assert first.similarity > 0.9
    assert [first.similarity, *(near.similarity for near in others)] == sorted(
        [first.similarity, *(near.similarity for near in others)], reverse=True
    )


def test_bytes_are_equal_when_trained_twice(model: RouterModel) -> None:
    """The digest names what a router was made from."""
    assert model.to_bytes() == train_router(PROMPTS, NOTHING).to_bytes()


def test_scores_are_equal_when_stored_and_loaded(model: RouterModel, tiny_embeddings: TokenEmbeddings) -> None:
    """With embeddings and without."""
    loaded = RouterModel.from_bytes(model.to_bytes())
    assert model.score([ABOUT_LEASE])[0].probabilities.tolist() == loaded.score([ABOUT_LEASE])[0].probabilities.tolist()
    rich = train_router(PROMPTS, NOTHING, tiny_embeddings)
    again = RouterModel.from_bytes(rich.to_bytes())
    before, after = (found.score([ABOUT_LEASE], tiny_embeddings)[0].probabilities for found in (rich, again))
    assert before.tolist() == after.tolist()
    assert before.tolist() != model.score([ABOUT_LEASE])[0].probabilities.tolist()


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_router_is_refused_when_loaded(content: bytes) -> None:
    """With our own error, whatever the library raises."""
    with pytest.raises(IntegrityError, match="can't be read"):
        RouterModel.from_bytes(content)


def test_scores_are_the_same_when_texts_are_read_together(model: RouterModel, tiny_embeddings: TokenEmbeddings) -> None:
    """Alone or with others, empty ones among them; up to rounding."""
    texts = [ABOUT_LEASE, "", ABOUT_BREAD, "?!"]
    for router, embeddings in ((model, None), (train_router(PROMPTS, NOTHING, tiny_embeddings), tiny_embeddings)):
        alone = [router.score([text], embeddings)[0].probabilities for text in texts]
        together = [scores.probabilities for scores in router.score(texts, embeddings)]
        assert np.allclose(alone, together, atol=1e-6)


def test_choice_stays_the_same_when_a_letter_is_wrong(model: RouterModel) -> None:
    """A word that nobody knows is read as the training prompts' word that it is one slip away from."""
    right, slipped = model.score([ABOUT_LEASE, "the lanldord ends the leasse of a tennant without notce"])
    assert right.probabilities.tolist() == slipped.probabilities.tolist()


def test_other_aliases_are_found_when_two_share_their_prompts() -> None:
    """The older of the two stands for both; neither takes anything from the certainty about the others."""
    model = train_router({**PROMPTS, "legal-next": [*PROMPTS["legal"], "one more about a lease"]}, NOTHING)
    assert [("cooking",), ("legal", "legal-next"), ("music",)] == sorted(model.groups)
    plain = train_router(PROMPTS, NOTHING)
    for text in (ABOUT_LEASE, ABOUT_BREAD):
        assert plain.score([text])[0].probabilities.tolist() == model.score([text])[0].probabilities.tolist()


def test_large_alias_takes_nothing_over_when_another_has_few_prompts() -> None:
    """Three prompts are enough to be found by, and no reason to be chosen for everything."""
    model = train_router({**PROMPTS, "legal": PROMPTS["legal"][:3]}, NOTHING)
    for text, expected in (("may my landlord end my lease early", "legal"), (ABOUT_BREAD, "cooking")):
        assert expected == model.aliases[int(model.score([text])[0].probabilities.argmax())]


def test_strangers_are_doubted_when_few_aliases_are_known() -> None:
    """Of four domains that no alias knows, most are nobody's to a router of two; its own are still found."""
    file = Path(__file__).parents[3] / "examples" / "routing.train.jsonl"
    texts = group_labelled(read_labelled(file))
    known = ("medical", "support")
    model = train_router({alias: texts[alias][:100] for alias in known}, read_background())
    strange = [text for alias, own in texts.items() if alias not in known for text in own[100:]]
    own = [text for alias in known for text in texts[alias][100:]]
    taken_in, routed = (
        np.mean([scores.probabilities.max() >= 0.5 for scores in model.score(asked)]) for asked in (strange, own)
    )
    assert taken_in < 0.45  # 0.54 while the gate could weigh the sum
    assert routed > 0.8


@pytest.mark.parametrize("aliases", [("medical", "support"), ("legal", "medical", "support")])
def test_alias_gains_nothing_from_doubt_when_a_text_is_more_like_it(aliases: tuple[str, ...]) -> None:
    """The gate opens the wider the higher the highest value is, whatever was left out to calibrate it."""
    texts = group_labelled(read_labelled(Path(__file__).parents[3] / "examples" / "routing.train.jsonl"))
    model = train_router({alias: texts[alias][:60] for alias in aliases}, read_background())
    assert model.calibration.gate_weight > 0


CHINESE = {
    "legal": [
        "房东可以不退押金吗",
        "租房合同提前解约怎么办",
        "房东要涨租金合法吗",
        "合同没有签字有效吗",
        "租客拖欠租金怎么办",
    ],
    "cooking": ["面包要烤多长时间", "汤里放多少盐", "蛋糕为什么会塌", "怎么做番茄鸡蛋汤", "烤箱应该多少度"],
}


def test_aliases_are_told_apart_when_the_script_has_no_spaces() -> None:
    """By parts of what looks like one long word."""
    model = train_router(CHINESE, [])
    for text, expected in (("房东不退租房押金", "legal"), ("烤面包烤箱多少度", "cooking")):
        assert expected == model.aliases[int(model.score([text])[0].probabilities.argmax())]


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "\u0130\ufdfa" * 100_000, "a " * 500_000, "\ud800" * 99, "e\u0301" * 99_999]
)
def test_any_text_is_scored_when_somebody_means_harm(text: str, model: RouterModel) -> None:
    """Long, growing under normalisation, without meaning or without bytes: finite, and nobody's."""
    (scores,) = model.score([text])
    assert np.isfinite(scores.probabilities).all()
    assert scores.probabilities.max() < 0.5


def test_one_prompt_an_alias_is_enough_when_trained() -> None:
    """The least there can be trains, and without general texts, too."""
    model = train_router({"a": ["alpha beta"], "b": ["gamma delta"]}, [])
    (scores,) = model.score(["alpha beta"])
    assert np.isfinite(scores.probabilities).all()
    assert 0 <= scores.none <= 1


@pytest.fixture(scope="module")
def tiny_embeddings(tiny_folders: dict[str, Path]) -> TokenEmbeddings:
    """Those of a tiny base model."""
    found = open_embeddings(tiny_folders["llama"])
    assert found is not None
    return found


def test_embeddings_are_those_of_the_model_when_read_from_its_file(
    tiny_folders: dict[str, Path], tiny_embeddings: TokenEmbeddings
) -> None:
    """The sum over a word's tokens, each dimension shifted and scaled, of length 1."""
    from safetensors.numpy import load_file

    table = load_file(tiny_folders["llama"] / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
    tokenizer = Tokenizer.from_file(str(tiny_folders["llama"] / "tokenizer.json"))
    words = ["landlord", "bread", "zyzzyva"]
    scaled = (table - table.mean(axis=0)) / table.std(axis=0)
    for word, row in zip(words, tiny_embeddings.rows(words), strict=True):
        tokens = tokenizer.encode(" " + word, add_special_tokens=False).ids
        expected = scaled[tokens].sum(axis=0)
        assert row == pytest.approx(expected / np.linalg.norm(expected), abs=1e-3)
    assert (0, table.shape[1]) == tiny_embeddings.rows([]).shape


def test_there_are_no_embeddings_when_a_folder_has_none(tmp_path: Path) -> None:
    """A router then goes by words alone."""
    assert open_embeddings(tmp_path) is None

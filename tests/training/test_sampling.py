"""Greedy answers of the model in training, and what makes an answer none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.base_model import LoadedBase
from adapters.chat_rows import ChatRow, LabelledRow, PreferenceRow, Row, TextRow
from adapters.chat_template import render_prompt, stop_token_ids
from adapters.errors import DataError
from tests.support.conversations import make_messages
from tests.support.tiny import load_tiny_base, make_tokenizer
from training.sampling import Flaw, Sample, SamplePrompt, find_flaw, is_loop, make_prompts, read_prompts, sample_answers


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([7] * 24, True),
        ([7] * 23, False),
        ([1, 2, 3, *([8, 9, 10, 11, 12, 13] * 4)], True),
        ([*([8, 9, 10, 11, 12, 13] * 4), 14], False),
        (list(range(64)) * 4, True),
        (list(range(65)) * 4, False),
        (list(range(10)) * 3, False),
        (list(range(200)), False),
        ([], False),
    ],
)
def test_loop_is_found_when_an_answer_ends_in_repetitions(tokens: list[int], expected: bool) -> None:
    """Four times or more, over 24 tokens at least, of up to 64."""
    assert is_loop(tokens) is expected


@pytest.mark.parametrize(
    ("text", "num_tokens", "reference", "has_ended", "expected"),
    [
        (" \n", 1, 10, True, "empty"),
        ("fine", 31, 10, False, "too long"),
        ("fine", 30, 10, False, None),
        ("fine", 31, 10, True, None),
        ("fine", 300, None, False, None),
    ],
)
def test_answer_is_flawed_when_it_is_empty_or_has_no_end(
    text: str, num_tokens: int, reference: int | None, has_ended: bool, expected: Flaw | None
) -> None:
    """Length is judged by the row's own answer alone, and only of an answer that was cut."""
    sample = Sample(SamplePrompt("?", (1,), reference), text, tuple(range(num_tokens)), has_ended)
    assert find_flaw(sample) == expected


def test_prompts_are_what_the_server_would_render_when_rows_are_of_any_kind() -> None:
    """Up to the last answer, whose length is the reference; of plain text the beginning."""
    tokenizer = make_tokenizer()
    asked = make_messages("q1", "a1", "q2", "four", system="Be brief.")
    question = tuple(make_messages("q1"))
    rows: list[Row] = [
        ChatRow(tuple(asked)),
        PreferenceRow(question, {"role": "assistant", "content": "good!"}, {"role": "assistant", "content": "bad"}),
        LabelledRow(question, {"role": "assistant", "content": "so"}, True),
        TextRow("abcdefghijklmnopqrstuvwxyz"),
    ]
    prompts = make_prompts(tokenizer, rows, limit=9)
    assert [prompt.text for prompt in prompts] == ["q2", "q1", "q1", "abcdefghijklmnopqrstuvwx"]
    assert [prompt.reference_tokens for prompt in prompts] == [4, 5, 2, None]
    assert prompts[0].input_ids == tuple(render_prompt(tokenizer, asked[:-1]))
    assert make_prompts(tokenizer, rows, limit=1) == prompts[:1]


def test_answers_are_the_likeliest_tokens_when_prompts_share_a_batch(tiny_folders: dict[str, Path]) -> None:
    """Each answer is what a loop of plain forward passes finds for its prompt alone, up to the end or the limit."""
    base = load_tiny_base(tiny_folders["llama"])
    rows: list[Row] = [ChatRow(tuple(make_messages(text, "x"))) for text in ("a", "a much longer question?", "bb")]
    prompts = make_prompts(base.tokenizer, rows, limit=3)
    state = torch.get_rng_state()
    base.model.train()
    samples = sample_answers(base.model, base.tokenizer, prompts, max_tokens=12, batch_size=2)
    assert base.model.training
    assert torch.equal(state, torch.get_rng_state())
    base.model.eval()
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = list(prompt.input_ids)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == base.tokenizer.eos_token_id:
                    break
        made = ids[len(prompt.input_ids) :]
        assert sample.has_ended == (made[-1] == base.tokenizer.eos_token_id)
        assert list(sample.tokens) == (made[:-1] if sample.has_ended else made)
        assert sample.text == base.tokenizer.decode(sample.tokens, skip_special_tokens=True)


def test_answers_end_where_the_server_ends_them_when_a_turn_ends_with_another_token_than_eos(
    tiny_folders: dict[str, Path],
) -> None:
    """As with Gemma and Phi: the template's own end of turn stops an answer, and is no part of it."""
    base = load_tiny_base(tiny_folders["llama"])
    end = base.tokenizer.eos_token_id
    base.tokenizer.eos_token = base.tokenizer.bos_token
    base.model.generation_config.eos_token_id = base.tokenizer.eos_token_id
    assert base.tokenizer.eos_token_id != end
    assert stop_token_ids(base.tokenizer, None) == {base.tokenizer.eos_token_id, end}
    prompts = make_prompts(base.tokenizer, [ChatRow(tuple(make_messages("a", "x")))], limit=1)
    (endless,) = sample_answers(base.model, base.tokenizer, prompts, max_tokens=6, batch_size=1)
    assert not endless.has_ended
    num_calls = 0

    def end_at_third(module: torch.nn.Module, given: tuple[torch.Tensor], logits: torch.Tensor) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            logits[..., end] = logits.max() + 1

    base.model.get_output_embeddings().register_forward_hook(end_at_third)
    (sample,) = sample_answers(base.model, base.tokenizer, prompts, max_tokens=6, batch_size=1)
    assert (sample.has_ended, sample.tokens) == (True, endless.tokens[:2])


def test_prompts_come_from_a_file_when_one_is_named(tmp_path: Path) -> None:
    """One a line; blank lines are no prompts."""
    tokenizer = make_tokenizer()
    path = tmp_path / "prompts.txt"
    path.write_text("First?\n\n  Second? \n")
    prompts = read_prompts(tokenizer, path)
    assert [prompt.text for prompt in prompts] == ["First?", "Second?"]
    assert prompts[1].input_ids == tuple(render_prompt(tokenizer, make_messages("Second?")))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "can't be read"),
        (b"\xff\xfe", "can't be read"),
        (b"\n \n", "expected 1 to 100 prompts, one a line, found 0"),
        (b"x\n" * 101, "found 101"),
        (b"hi <|im_end|>", "control token"),
    ],
)
def test_prompts_are_refused_when_the_file_is_bad(tmp_path: Path, content: bytes | None, problem: str) -> None:
    """By the name of the setting and the file."""
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"^sample_file {path}: ") as caught:
        read_prompts(make_tokenizer(), path)
    assert problem in str(caught.value)


# Answers that are ended early -----------------------------------------------------------------------------------------


def _babble(base: LoadedBase, reference: int | None, max_tokens: int = 90) -> list[Sample]:
    prompts = [
        SamplePrompt("?", tuple(render_prompt(base.tokenizer, [{"role": "user", "content": text}])), reference)
        for text in ("a", "b", "long one")
    ]
    return sample_answers(base.model, base.tokenizer, prompts, max_tokens=max_tokens, batch_size=3, ends_flawed=True)


def test_answers_are_ended_when_they_are_too_long_already(tiny_base: LoadedBase) -> None:
    """At one token more than three times the row's own, where the flaw is certain; up to there all is the same."""
    free, bounded = _babble(tiny_base, None), _babble(tiny_base, 5)
    assert [16] * 3 == [len(sample.tokens) for sample in bounded if not sample.has_ended]
    assert [sample.tokens[:16] for sample in free] == [sample.tokens for sample in bounded]
    assert {"too long"} == {find_flaw(sample) for sample in bounded} - {"loop"}


def test_answer_is_ended_when_it_has_looped_for_long(tiny_base: LoadedBase) -> None:
    """One that says the same for ever costs the batch 72 tokens and not the limit; it is still told as a loop."""
    tiny_base.model.get_output_embeddings().weight.data.zero_()  # the likeliest token is the first, always
    samples = _babble(tiny_base, None, max_tokens=400)
    assert [(72, False, "loop")] * 3 == [(len(s.tokens), s.has_ended, find_flaw(s)) for s in samples]

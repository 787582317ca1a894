"""Which token wrote what: the bytes of the tokens join to the text, whatever the tokens and wherever it is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine.core import TokenLogprob
from server.engine.text_stream import TextStream
from server.engine.token_text import TokenBytes, TokenTrail
from tests.support.engine import Bench, ask
from tests.support.tiny import make_tokenizer

TOKENIZER: Any = make_tokenizer()


def _follow(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[TokenLogprob]]:
    """The text that was shown and the tokens that were handed out, as the engine does it."""
    stream, trail = TextStream(tokenizer, stop), TokenTrail(TokenBytes(tokenizer))
    shown = ""
    entries: list[TokenLogprob] = []
    for token in ids:
        text = stream.push(token)
        trail.add(TokenLogprob(token, -1.0))
        trail.write(stream.decoded, is_complete=stream.is_complete)
        if stream.is_stopped:
            break
        shown += text
        entries += trail.show(len(text))
        text = ""
    else:
        text = ""
    text += stream.finish()
    trail.write(stream.decoded)
    return shown + text, [*entries, *trail.show(len(text)), *trail.end()]


def _joined(entries: list[TokenLogprob]) -> str:
    return b"".join(entry.text_bytes for entry in entries).decode("utf-8", "replace")


@given(st.text(max_size=30))
def test_bytes_join_to_the_text_when_it_is_any(text: str) -> None:
    """Each token has just its byte, also within a character."""
    ids = TOKENIZER.encode(text)
    shown, entries = _follow(TOKENIZER, ids)
    assert (text, ids) == (shown, [entry.token for entry in entries])
    assert [bytes([byte]) for byte in text.encode()] == [entry.text_bytes for entry in entries]


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_bytes_join_to_the_text_when_tokens_are_arbitrary(ids: list[int]) -> None:
    """Also where they are no UTF-8 or special; every token is handed out once, in order."""
    shown, entries = _follow(TOKENIZER, ids)
    assert ids == [entry.token for entry in entries]
    assert shown == _joined(entries)


@given(st.text(alphabet="abñ😀", max_size=24), st.text(alphabet="abñ😀", min_size=1, max_size=3))
def test_bytes_join_to_what_is_shown_when_a_stop_string_cuts_it(text: str, stop: str) -> None:
    """Tokens of the stop string and behind it are never handed out."""
    shown, entries = _follow(TOKENIZER, TOKENIZER.encode(text), (stop,))
    assert text.split(stop)[0] == shown == _joined(entries)


def _word_tokenizer() -> Any:
    """A vocabulary of words in SentencePiece's manner: a space in front, single bytes as fallback."""
    words = ["<unk>", "</s>", "▁to", "▁be", "END", "▁END!", "<0xC3>", "<0xB1>", "é"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def test_bytes_join_to_the_text_when_the_first_space_is_dropped() -> None:
    """A decoder that strips the answer's first space, and characters in single bytes."""
    shown, entries = _follow(_word_tokenizer(), [2, 3, 1, 6, 7, 8])
    assert (shown, b"to") == ("to beñé", entries[0].text_bytes)
    assert [b"to", b" be", b"", b"\xc3", b"\xb1", "é".encode()] == [entry.text_bytes for entry in entries]


@pytest.mark.parametrize(("stop", "shown"), [("END", "to "), ("D!", "to EN"), ("!", "to END")])
def test_token_keeps_what_was_shown_when_a_stop_string_cuts_it_in_the_middle(stop: str, shown: str) -> None:
    """The token is named, with the part of its text that is in the answer."""
    text, entries = _follow(_word_tokenizer(), [2, 5, 3], (stop,))
    assert shown == text == _joined(entries)
    assert [2, 5] == [entry.token for entry in entries]


def test_token_has_its_own_bytes_when_it_stands_alone() -> None:
    """Candidates beside the chosen token have no text around them."""
    words, letters = TokenBytes(_word_tokenizer()), TokenBytes(TOKENIZER)
    assert [words.of(token) for token in (2, 6, 1, 8)] == [b" to", b"\xc3", b"", "é".encode()]
    assert bytes(range(256)) == b"".join(sorted(letters.of(token) for token in range(256)))


@pytest.mark.parametrize("options", [{}, {"stop": ("e", "a")}, {"ignore_eos": True, "logit_bias": ((257, 5.0),)}])
def test_events_logprobs_join_to_the_answer_when_the_engine_made_it(bench: Bench, options: dict[str, Any]) -> None:
    """One entry for each token of the text, with as many candidates as asked for, likeliest first."""
    engine = bench.engine(tokenizer=TOKENIZER, max_prefill_tokens=256)
    for seed in range(4):
        request = ask(str(seed), "hello", max_tokens=24, temperature=1.5, seed=seed, top_logprobs=2, **options)
        events = engine.submit(request)
        while not engine.is_idle:
            events += engine.step()
        entries = [entry for event in events for entry in event.logprobs]
        assert "".join(event.text for event in events) == _joined(entries)
        assert entries
        for entry in entries:
            assert (2, sorted(entry.top, key=lambda pair: -pair[1])) == (len(entry.top), list(entry.top))
            assert entry.logprob <= entry.top[0][1] < 0
        if "ignore_eos" in options:
            assert 24 == len(entries)
            assert any(not entry.text_bytes for entry in entries)
    engine.close()

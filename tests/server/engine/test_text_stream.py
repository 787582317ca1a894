"""From tokens to text: never half a character, never a stop string or what follows it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.text_stream import TextStream
from tests.support.tiny import make_tokenizer

TOKENIZER: Any = make_tokenizer()  # one token per byte: every character beyond ASCII is split
# Few letters, so that stop strings occur; characters of one to four bytes.
LETTERS = st.text(alphabet="abñ€😀", max_size=24)
STOPS = st.lists(st.text(alphabet="abñ😀", min_size=1, max_size=4), min_size=1, max_size=3)


def _stream(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    """The pieces that each token released, the rest, and whether a stop string was met."""
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    return pieces, stream.finish(), stream.is_stopped


def test_push_holds_bytes_back_when_a_character_is_incomplete() -> None:
    """An emoji of four byte tokens comes out whole, with its last one."""
    pieces, rest, _ = _stream(TOKENIZER.encode("a😀b"))
    assert pieces == ["a", "", "", "", "😀", "b"]
    assert rest == ""


def test_push_keeps_joined_emoji_in_order_when_they_consist_of_several_characters() -> None:
    """A family emoji is seven characters; each comes whole and none is lost."""
    text = "👨‍👩‍👧‍👦!"
    pieces, rest, _ = _stream(TOKENIZER.encode(text))
    assert text == "".join(pieces) + rest
    assert not any("\ufffd" in piece for piece in pieces)


def test_finish_returns_a_replacement_when_the_last_character_was_never_completed() -> None:
    """What the model left unfinished is shown as such, once, at the end."""
    pieces, rest, _ = _stream(TOKENIZER.encode("a😀")[:-1])
    assert pieces == ["a", "", "", ""]
    assert rest == "\ufffd"


@given(st.text(max_size=30))
def test_pieces_join_to_the_whole_text_when_nothing_stops_it(text: str) -> None:
    """For any text, what was pushed and the rest are the text, and no piece ends in half a character."""
    pieces, rest, _ = _stream(TOKENIZER.encode(text))
    assert text == "".join(pieces) + rest


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_pieces_join_to_the_decoded_whole_when_tokens_are_arbitrary(ids: list[int]) -> None:
    """For any tokens, valid UTF-8 or not and special ones among them, streaming loses and invents nothing."""
    pieces, rest, _ = _stream(ids)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "".join(pieces) + rest


def test_character_comes_whole_when_broken_bytes_precede_it() -> None:
    """Three bytes that begin nothing, then a character of three: only its own bytes make it."""
    continuation, start = TOKENIZER.encode("ࡡ")[-1], TOKENIZER.encode("ࡡ")[0]
    pieces, rest, _ = _stream([continuation] * 3 + [start, continuation, continuation])
    assert "\ufffd" * 3 + "ࡡ" == "".join(pieces) + rest


def test_broken_characters_are_shown_when_there_are_many() -> None:
    """A model that writes nonsense for ever does not hold its answer back for ever."""
    broken = TOKENIZER.encode("ࡡ")[-1]
    pieces, _, _ = _stream([broken] * 200)
    assert len("".join(pieces)) >= 200 - 3


@given(LETTERS, st.text(alphabet="abñ😀", min_size=1, max_size=4))
def test_text_is_cut_before_the_stop_string_when_there_is_one(text: str, stop: str) -> None:
    """The output is what stands before the first occurrence, or everything if there is none."""
    pieces, rest, is_stopped = _stream(TOKENIZER.encode(text), (stop,))
    assert text.split(stop)[0] == "".join(pieces) + rest
    assert (stop in text) == is_stopped


@given(LETTERS, STOPS)
def test_text_never_holds_a_stop_string_when_there_are_several(text: str, stops: list[str]) -> None:
    """The output is cut where the stop string that was completed first begins."""
    pieces, rest, is_stopped = _stream(TOKENIZER.encode(text), tuple(stops))
    output = "".join(pieces) + rest
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert (expected, bool(ends)) == (output, is_stopped)
    assert not any(stop in output for stop in stops)


@given(LETTERS, STOPS)
def test_push_holds_no_more_than_needed_when_a_stop_string_may_begin(text: str, stops: list[str]) -> None:
    """What has been decoded and not been shown is the beginning of a stop string, or empty."""
    ids = TOKENIZER.encode(text)
    stream = TextStream(TOKENIZER, tuple(stops))
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += stream.push(token)
        if stream.is_stopped:
            break
        decoded = TOKENIZER.decode(ids[:count]).rstrip("\ufffd")
        assert decoded.startswith(shown)
        assert any(stop.startswith(decoded[len(shown) :]) for stop in stops)


@pytest.mark.parametrize("stop", ["END", "D\n", "😀"])
def test_stop_string_is_found_when_it_crosses_token_borders(stop: str) -> None:
    """Every stop string here takes several tokens."""
    pieces, rest, is_stopped = _stream(TOKENIZER.encode(f"before {stop} after"), (stop,))
    assert ("".join(pieces), rest, is_stopped) == ("before ", "", True)


def test_finish_returns_the_held_text_when_a_stop_string_only_began() -> None:
    """The first half of a stop string is text like any other once no more tokens come."""
    pieces, rest, is_stopped = _stream(TOKENIZER.encode("wait EN"), ("END",))
    assert ("".join(pieces), rest, is_stopped) == ("wait ", "EN", False)


def test_special_tokens_are_left_out_when_they_are_generated() -> None:
    """A special token in the middle adds nothing to the text."""
    ids = [*TOKENIZER.encode("ab"), TOKENIZER.bos_token_id, *TOKENIZER.encode("c")]
    assert _stream(ids) == (["a", "b", "", "c"], "", False)


def test_stop_string_is_found_when_it_ends_with_the_replacement_character() -> None:
    """A character that incomplete text looks like is held to the end, and must be searched there."""
    pieces, rest, _ = _stream(TOKENIZER.encode("a\ufffd"), ("\ufffd",))
    assert "".join(pieces) + rest == "a"

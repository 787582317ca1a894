"""Templates: what prompts share word for word is found and taken away, what they ask is not."""

from __future__ import annotations

from adapters.routing.templates import find_templates, strip_templates

QUESTIONS = [
    "may he leave",
    "who pays then",
    "is it due",
    "what now please",
    "can she go",
    "why so late",
    "do i sign",
    "has it begun",
]


def test_templates_are_found_when_many_prompts_share_them() -> None:
    """As far as they agree, and no further."""
    texts = [f"which kind of clause is this ? {question} . name the topic ." for question in QUESTIONS]
    assert (("which kind of clause is this ?",), (". name the topic .",)) == find_templates(texts)


def test_template_is_found_for_all_when_most_texts_end_alike() -> None:
    """Those that don't are in the same template, only without the question mark that the others have."""
    texts = [f"{question} {'?' if number else '!'} name the topic ." for number, question in enumerate(QUESTIONS)]
    _, ends = find_templates(texts + texts[1:])
    assert ("? name the topic .", "name the topic .") == ends
    assert "may he leave !" == strip_templates(texts[0], (), ends)


def test_no_template_is_found_when_prompts_are_written_freely() -> None:
    """Nor where few prompts begin alike."""
    assert ((), ()) == find_templates(QUESTIONS)
    assert ((), ()) == find_templates(["how do i bake"] * 3 + QUESTIONS)


def test_the_longest_is_taken_away_when_several_fit() -> None:
    """Templates are given with the longest first; a prompt that is nothing else is left as it is."""
    starts = ("tell me the rule for", "tell me the")
    assert "a tenant now" == strip_templates("tell me the rule for a tenant now", starts, ())
    assert "due date please" == strip_templates("tell me the due date please", starts, ())
    assert "tell me the rule for tenants" == strip_templates("tell me the rule for tenants", starts, ())
    assert "a b" == strip_templates("a b name the topic", (), ("name the topic",))

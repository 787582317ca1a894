"""Constrained answers: whatever the model wants, the answer has its form; and what can't be followed fails alone."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.constraints import GrammarCompiler, GrammarError
from server.engine.core import Constraint, EngineEvent, GenerationRequest, SamplingParams, TokenLogprob
from server.engine.sampling import Choice, Sampler, choose_tokens
from server.engine.scheduler import Engine
from tests.support.engine import Answer, Bench, Reference, ask, collect, drain, encode, run_to_end
from tests.support.tiny import make_tokenizer

TOKENIZER: Any = make_tokenizer()
END = TOKENIZER.eos_token_id
VOCAB = len(TOKENIZER) + 100  # models pad their vocabulary, here by more than the mask's last word
PROMPT = "hello there"
ANY_OBJECT = Constraint("json_object")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "is_known": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "tags", "is_known"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    """One compiler for the walks over random logits."""
    made = GrammarCompiler(TOKENIZER, [END])
    yield made
    made.close()


@pytest.fixture
def engine(bench: Bench) -> Iterator[Engine]:
    """An engine that nobody else uses, with the model's own tokenizer."""
    made = bench.engine(tokenizer=TOKENIZER, max_prefill_tokens=256)
    yield made
    made.close()


def _schema(schema: Any) -> Constraint:
    return Constraint("json_schema", schema=json.dumps(schema))


def _walk(compiler: GrammarCompiler, constraint: Constraint, seed: int, *, limit: int = 400) -> tuple[str, bool]:
    """An answer from random logits, and whether it came to its end."""
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(limit, seed=seed, constraint=constraint)
    sampler = Sampler(params, (1,), frozenset({END}), compiler.compile(constraint))
    tokens: list[int] = []
    while len(tokens) < limit and not sampler.is_finished:
        logits = torch.randn(1, VOCAB, generator=generator) * 4
        choice = choose_tokens(logits, [0], {0: sampler})[0]
        assert isinstance(choice, Choice)
        sampler.accept(choice.token)
        if choice.token == END:
            return TOKENIZER.decode(tokens), True
        tokens.append(choice.token)
    return TOKENIZER.decode(tokens), sampler.is_finished


CHOICES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=2, unique=True)


@settings(max_examples=60, deadline=None)
@given(CHOICES, st.integers(0, 2**32))
def test_answer_is_one_of_the_choices_when_logits_are_random(
    compiler: GrammarCompiler, choices: list[str], seed: int
) -> None:
    """Any text can be a choice: prefixes of others, quotes, control characters, emoji."""
    answer, is_finished = _walk(compiler, Constraint("choices", choices=tuple(choices)), seed)
    assert is_finished
    assert answer in choices


def test_every_choice_can_be_the_answer_when_one_is_a_prefix_of_another(compiler: GrammarCompiler) -> None:
    """The shorter one ends by the end-of-turn token, the longer one by itself."""
    constraint = Constraint("choices", choices=("yes", "yes, please", "no"))
    assert set(constraint.choices) == {_walk(compiler, constraint, seed)[0] for seed in range(40)}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_answer_is_a_json_object_when_logits_are_random(compiler: GrammarCompiler, seed: int) -> None:
    """If it comes to its end it parses; it never begins as anything else."""
    answer, is_finished = _walk(compiler, ANY_OBJECT, seed)
    assert answer.startswith("{")
    if is_finished:
        assert isinstance(json.loads(answer, strict=True), dict)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_answer_fits_its_schema_when_logits_are_random(compiler: GrammarCompiler, seed: int) -> None:
    """A bounded schema is always finished, and every field is what it says."""
    answer, is_finished = _walk(compiler, _schema(PERSON), seed, limit=4000)
    assert is_finished
    person = json.loads(answer)
    assert list(PERSON["properties"]) == list(person)  # type: ignore[call-overload]
    assert len(person["name"]) <= 5
    assert 0 <= person["age"] <= 130
    assert set(person["tags"]) <= {"a", "b"}
    assert person["is_known"] in (True, False, None)


def test_white_space_is_bounded_when_the_model_wants_nothing_else(compiler: GrammarCompiler) -> None:
    """A model that is unsure must not fill its answer with blanks; and a schema can't say otherwise."""
    schema = {**PERSON, "x-guidance": {"whitespace_pattern": " *"}}
    matcher = compiler.compile(_schema(schema)).result().start()
    matcher.accept(encode("{")[0])
    count = 0
    while matcher.allowed_tokens()[encode(" ")[0]]:
        matcher.accept(encode(" ")[0])
        count += 1
        assert count < 100
    assert count > 8


def test_answers_have_their_forms_when_they_run_beside_others(engine: Engine, reference_answers: Reference) -> None:
    """The mask is one row's: neighbours without one get their own tokens, greedy or not."""
    plain = ask("plain", PROMPT, max_tokens=20)
    no_blanks = tuple((token, -100.0) for token in encode(" \n"))  # so that it ends within the context
    requests = [
        ask("person", PROMPT, max_tokens=110, constraint=_schema(PERSON), logit_bias=no_blanks),
        plain,
        ask("choice", PROMPT, temperature=1.0, constraint=Constraint("choices", choices=("yes", "no"))),
        ask("object", PROMPT, temperature=1.0, max_tokens=5, constraint=ANY_OBJECT),
    ]
    answers = run_to_end(engine, *requests)
    assert reference_answers.text(plain.prompt, None, 20) == answers["plain"].text
    assert (json.loads(answers["person"].text).keys(), "stop") == (
        PERSON["properties"].keys(),  # type: ignore[attr-defined]
        answers["person"].finish_reason,
    )
    assert answers["choice"].text in ("yes", "no")
    assert (answers["choice"].finish_reason, len(answers["choice"].text)) == (
        "stop",
        answers["choice"].completion_tokens,
    )
    assert answers["object"].text.startswith("{")
    assert {1} == {answer.num_terminal for answer in answers.values()}


def test_end_of_turn_is_allowed_when_the_answer_may_be_complete(engine: Engine) -> None:
    """A bias for the end ends the answer there, and no earlier."""
    choices = Constraint("choices", choices=("yes", "yes, please"))
    answers = run_to_end(
        engine,
        ask("short", PROMPT, constraint=choices, logit_bias=((END, 100.0),)),
        ask("long", PROMPT, max_tokens=20, constraint=choices, logit_bias=((END, -100.0),)),
    )
    assert [("yes", "stop"), ("yes, please", "stop")] == [
        (answers[name].text, answers[name].finish_reason) for name in ("short", "long")
    ]


def test_grammar_decides_where_the_answer_ends_when_min_tokens_say_otherwise(engine: Engine) -> None:
    """A complete answer can't be made longer: what may follow is the grammar's business alone."""
    choices = Constraint("choices", choices=("yes", "yes, please"))
    request = ask("r", PROMPT, min_tokens=8, constraint=choices, logit_bias=((END, 100.0),))
    assert run_to_end(engine, request)["r"].text == "yes"


@pytest.mark.parametrize("schema", ['{"type": "objekt"}', "[]", "{", '{"type": "array", "uniqueItems": true}'])
def test_request_fails_alone_when_its_schema_can_not_be_compiled(
    schema: str, engine: Engine, reference_answers: Reference
) -> None:
    """One event with a reason that may be shown; the engine goes on, and says the same the next time."""
    bad = ask("bad", PROMPT, constraint=Constraint("json_schema", schema=schema))
    good = ask("good", PROMPT)
    for _ in range(2):
        answers = run_to_end(engine, bad, good)
        assert (answers["bad"].finish_reason, answers["bad"].num_terminal) == ("constraint_failed", 1)
        assert "form" in str(answers["bad"].error)
        assert reference_answers.text(good.prompt, None, 8) == answers["good"].text


def test_request_fails_alone_when_its_grammar_becomes_too_complex(engine: Engine, reference_answers: Reference) -> None:
    """What compiles may still be too much to follow: the limits of one step end that answer."""
    many = {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {} for j in range(10)}} for i in range(200)]}
    good = ask("good", PROMPT)
    answers = run_to_end(engine, ask("bad", PROMPT, constraint=_schema(many)), good)
    assert (answers["bad"].finish_reason, answers["bad"].num_terminal) == ("constraint_failed", 1)
    assert "9400 items; max is 2000" in str(answers["bad"].error)
    assert reference_answers.text(good.prompt, None, 8) == answers["good"].text


def test_request_fails_alone_when_the_tokenizer_can_not_be_read(bench: Bench) -> None:
    """A tokenizer that llguidance doesn't know fails constrained answers, and says nothing of its insides."""
    engine = bench.engine()  # its tokenizer is a toy
    answers = run_to_end(engine, ask("bad", PROMPT, constraint=ANY_OBJECT), ask("good", PROMPT))
    engine.close()
    assert (answers["bad"].finish_reason, answers["good"].finish_reason) == ("constraint_failed", "length")
    assert answers["bad"].error == "the answer's form could not be compiled"


def test_cancel_ends_a_request_when_its_grammar_is_being_compiled(engine: Engine) -> None:
    """It has one event, is never computed, and the engine is idle."""
    assert engine.submit(ask("r", PROMPT, constraint=ANY_OBJECT)) == []
    assert (engine.num_waiting, engine.is_idle) == (1, False)
    assert ["cancelled"] == [event.finish_reason for event in engine.cancel("r")]
    assert (engine.num_waiting, engine.is_idle) == (0, True)


def test_deadline_ends_a_request_when_its_grammar_is_still_being_compiled(bench: Bench) -> None:
    """Its time counts from submission, not from the queue behind the compiler."""
    now = [0.0]
    engine = bench.engine(tokenizer=make_tokenizer(), clock=lambda: now[0])
    request = ask("r", PROMPT, constraint=ANY_OBJECT)
    assert [] == engine.submit(dataclasses.replace(request, timeout_s=5))
    now[0] = 6.0
    assert ["deadline"] == [event.finish_reason for event in engine.step()]
    assert engine.is_idle
    engine.close()


def test_grammar_is_compiled_once_a_request_when_more_are_queued_than_are_kept(engine: Engine) -> None:
    """A request takes its compiled grammar along: the engine's thread never waits for the compiler again."""
    compiled: list[Constraint] = []
    compile_one = engine._grammars._compile
    engine._grammars._compile = lambda constraint: (compiled.append(constraint), compile_one(constraint))[1]  # type: ignore[method-assign, func-returns-value]
    constraints = [Constraint("choices", choices=(f"a{index}", f"b{index}")) for index in range(40)]
    run_to_end(engine, *(ask(str(index), PROMPT, constraint=form) for index, form in enumerate(constraints)))
    assert constraints == compiled


def test_answer_has_its_form_when_its_grammar_was_forgotten_in_the_queue(engine: Engine) -> None:
    """More schemas than are kept: each request is answered by its own."""
    answers: dict[str, Answer] = {}
    for index in range(40):
        constraint = Constraint("choices", choices=(f"a{index}", f"b{index}"))
        collect(engine.submit(ask(str(index), PROMPT, constraint=constraint)), answers)
    drain(engine, answers)
    assert all(answers[str(index)].text in (f"a{index}", f"b{index}") for index in range(40))


def test_grammar_is_compiled_once_when_many_answers_follow_it(compiler: GrammarCompiler) -> None:
    """Two answers share the grammar and not their places in it."""
    first, second = (compiler.compile(ANY_OBJECT) for _ in range(2))
    assert first is second
    wait([first])
    one, other = first.result().start(), second.result().start()
    one.accept(encode("{")[0])
    other.accept(encode("{")[0])
    one.accept(encode("}")[0])
    assert (True, False) == (one.is_finished, other.is_finished)


def test_matcher_raises_when_a_token_is_not_allowed(compiler: GrammarCompiler) -> None:
    """A matcher that has failed says so from there on."""
    matcher = compiler.compile(ANY_OBJECT).result().start()
    with pytest.raises(GrammarError):
        matcher.accept(encode("x")[0])
    with pytest.raises(GrammarError):
        matcher.allowed_tokens()
    assert not matcher.is_finished


def test_request_is_the_same_when_it_crosses_a_process_border() -> None:
    """Constraints are plain values, and so are log-probabilities on their way back."""
    request = GenerationRequest("r", (1,), None, SamplingParams(1, constraint=_schema(PERSON)))
    event = EngineEvent("r", "x", 1, logprobs=(TokenLogprob(5, -0.5, ((5, -0.5),), b"x"),))
    assert (request, event) == pickle.loads(pickle.dumps((request, event)))

"""The preflight: what stops a run is collected by line, what its owner should know is told, figures are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.errors import DataError
from tests.support.conversations import make_dataset, make_messages
from tests.support.tiny import make_tokenizer
from training.config import TrainSettings
from training.formats import Dataset
from training.preflight import Preflight, inspect_data, run_preflight

WORDS = ["apples", "bridges", "candles", "dolphins", "engines", "feathers", "gardens", "harbours", "islands", "jackets"]


DUPLICATE_ADVICE = "hotswap data convert --drop-duplicates leaves them out"
PERSONAL_ADVICE = "leave these rows out or mask it before training: a version may repeat what it has learned"


def _settings(tmp_path: Path, max_length: int = 1000, **others: Any) -> TrainSettings:
    return TrainSettings.load(tmp_path, max_length=max_length, **others)


def _labelled_rows(labels: list[bool]) -> list[Any]:
    return [
        {"prompt": f"Q of {word}", "completion": f"{word[::-1]} yes", "label": label}
        for word, label in zip(WORDS, labels, strict=True)
    ]


def _good_rows() -> list[Any]:
    """Ten rows that nobody needs to be warned of."""
    return [make_messages(f"Tell me of {word}", f"What {word} do is {word[::-1]}.") for word in WORDS]


def _inspect(tmp_path: Path, rows: list[Any], valid: list[Any] | None = None, **settings: Any) -> Preflight:
    validation = None if valid is None else _dataset(tmp_path, "v", valid)
    return inspect_data(
        _dataset(tmp_path, "t", rows), validation, tokenizer=make_tokenizer(), settings=_settings(tmp_path, **settings)
    )


def _dataset(tmp_path: Path, name: str, rows: list[Any]) -> Dataset:
    dataset = make_dataset(tmp_path / name, rows)
    return Dataset(name, dataset.sha256, dataset.kind, dataset.rows)


def test_inspect_data_is_silent_when_the_data_is_good(tmp_path: Path) -> None:
    """No warning that nobody needs: people would stop to read them."""
    report = _inspect(tmp_path, _good_rows(), _other_rows())

    assert () == report.train.problems
    assert () == report.warnings
    assert [10, 10] == [found.num_rows for found in report.sets]


def _other_rows() -> list[Any]:
    return [make_messages(f"How do {word} smell?", f"Like {word[1:]} in rain.") for word in WORDS]


DOUBTFUL: dict[str, tuple[list[Any], str]] = {
    "few-rows": (_good_rows()[:9], "t: number of rows: 9; fewer than 10 seldom teach a behaviour"),
    "copies": (
        [*_good_rows(), *_good_rows()[:6]],
        f"t: rows that equal an earlier one: 6 (lines 11, 12, 13, 14, 15 and 1 more); {DUPLICATE_ADVICE}",
    ),
    "near-copies": (
        [*_good_rows(), make_messages("tell me of APPLES!", "What apples do is selppa.")],
        "t: rows that equal an earlier one in 80% of their text or more: 1 (line 11)",
    ),
    "contradictions": (
        [*_good_rows(), make_messages("Tell me of apples", "A wholly different thing, in many other words.")],
        "t: rows that ask what an earlier one asks, and answer otherwise: 1 (line 11)",
    ),
    "encoding": (
        [*_good_rows(), make_messages("Wie geht es?", "Es geht schön, danke der Nachfrage".encode().decode("cp1252"))],
        "t: rows with signs of a wrong encoding, such as Ã£ or \ufffd: 1 (line 11)",
    ),
    "personal-data": (
        [*_good_rows(), make_messages("Who is it?", "ann@x.de, bob@x.de")],
        f"t: likely personal data, e-mail address: 2 found; rows: 1 (line 11); {PERSONAL_ADVICE}",
    ),
    "little-loss": (
        [make_messages("".join(f"{word}{n} " for n in range(20)) * 3, "y") for word in WORDS],
        "t: only 0.3% of the tokens carry loss: most of the time would go into reading prompts",
    ),
}


@pytest.mark.parametrize(("rows", "expected"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_inspect_data_warns_when_the_owner_should_know(tmp_path: Path, rows: list[Any], expected: str) -> None:
    """One sentence a finding, with how many rows and on which lines; nothing else is said of these rows."""
    assert (expected,) == _inspect(tmp_path, rows, max_length=10_000).warnings


def test_inspect_data_never_shows_personal_data_when_it_counts_it(tmp_path: Path) -> None:
    """The report goes to logs and events."""
    report = _inspect(tmp_path, [*_good_rows(), make_messages("Who?", "ann@x.de or DE89 3704 0044 0532 0130 00")])

    assert {"e-mail address": 1, "IBAN": 1} == dict(report.train.personal_data)
    assert "ann@x.de" not in repr(report)
    assert "3704" not in repr(report)


def test_inspect_data_warns_when_validation_repeats_the_training_data(tmp_path: Path) -> None:
    """Rows that both files hold make the loss a measure of memory; near copies as well, but not copies within one."""
    near = make_messages("Tell me of bridges?", "What bridges do is segdirb!")
    report = _inspect(tmp_path, _good_rows(), [*_other_rows(), _good_rows()[0], near, _other_rows()[0]])

    assert (
        "v: rows that equal an earlier one: 1 (line 13); hotswap data convert --drop-duplicates leaves them out",
        "v: rows that stand in t: 1 (line 11); the validation loss will look better than it is",
        "v: rows that nearly equal one of t: 1 (line 12); the validation loss will look better than it is",
    ) == report.warnings


def test_run_preflight_names_the_field_when_validation_is_of_another_kind(tmp_path: Path) -> None:
    """What is trained on one kind can't be validated on another."""
    train, validation = _dataset(tmp_path, "t", _good_rows()), _dataset(tmp_path, "v", [{"text": "Once."}])

    with pytest.raises(DataError, match=r"^v: holds text rows, but t chat rows$") as caught:
        run_preflight(
            train,
            validation,
            tokenizer=make_tokenizer(),
            settings=_settings(tmp_path),
            train_param="training_file",
            validation_param="validation_file",
        )
    assert "validation_file" == caught.value.param


def test_run_preflight_collects_what_stops_a_run_when_rows_are_bad(tmp_path: Path) -> None:
    """Too long, or holding a control token: equal ones once, with the first of their lines and the range of lengths."""
    bad = [*_good_rows(), make_messages("q", "a" * 200), make_messages("q", "<|im_end|>")]
    rows = [*bad, *[make_messages("q", "b" * 300)] * 20]
    frame = len("user\n\n") + 2 + len("assistant\n") + 1 + 1

    with pytest.raises(DataError) as caught:
        run_preflight(
            _dataset(tmp_path, "t", rows),
            None,
            tokenizer=make_tokenizer(),
            settings=_settings(tmp_path, 150),
            train_param="data",
        )

    lengths = f"{1 + 200 + frame} to {1 + 300 + frame}"
    assert [
        f"t: lines 11, 13, 14, 15, 16 and 16 more: {lengths} tokens, more than max_length 150",
        "t:12: messages[1].content holds the model's control token <|im_end|>",
    ] == caught.value.problems
    assert "data" == caught.value.param


def test_inspect_data_refuses_a_row_when_it_begins_twice(tmp_path: Path) -> None:
    """A template that writes the first token twice teaches a prompt that the server never gives."""
    tokenizer = make_tokenizer("{{ bos_token }}" + str(make_tokenizer().chat_template))

    report = inspect_data(
        _dataset(tmp_path, "t", _good_rows()), None, tokenizer=tokenizer, settings=_settings(tmp_path)
    )

    (problem,) = report.train.problems
    assert problem.startswith("t: lines 1, 2, 3, 4, 5 and 5 more: begins with the beginning-of-sequence token twice: ")


def test_inspect_data_counts_tokens_when_rows_are_rendered(tmp_path: Path) -> None:
    """Each figure as counted by hand: the tokenizer makes a token a byte, the template frames each message."""
    frame = len("user\n\n") + 2 + len("assistant\n") + 1 + 1  # two beginnings of turns, two ends
    rows = [make_messages("q" * n, "a" * 10) for n in (10, 20, 30, 40)]

    tokens = _inspect(tmp_path, rows).train.tokens

    assert tokens is not None
    lengths = [n + 10 + frame for n in (10, 20, 30, 40)]
    assert (sum(lengths), lengths[0], lengths[1], lengths[3], lengths[3]) == (
        tokens.total,
        tokens.shortest,
        tokens.median,
        tokens.p95,
        tokens.longest,
    )
    assert 4 * 11 / sum(lengths) == pytest.approx(tokens.loss_share)
    assert {2: 4} == tokens.starts
    assert {1: 4} == tokens.ends
    assert 4 == sum(count for _, _, count in tokens.histogram)
    assert (lengths[0], lengths[3]) == (tokens.histogram[0][0], lengths[3])
    assert all(first <= last for first, last, _ in tokens.histogram)


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (
            "dpo",
            [{"prompt": f"Q of {word}", "chosen": f"{word} yes", "rejected": f"{word[::-1]} no"} for word in WORDS],
        ),
        ("kto", _labelled_rows([True, False] * 5)),
        ("sft", [{"text": f"Once upon a time {word} met {word[::-1]}."} for word in WORDS]),
    ],
    ids=["preference", "labelled", "text"],
)
def test_inspect_data_takes_every_kind_when_rows_are_good(tmp_path: Path, method: str, rows: list[Any]) -> None:
    """Figures are of all that is rendered: both answers of a preference."""
    report = _inspect(tmp_path, rows, method=method)

    assert ((), ()) == (report.train.problems, report.warnings)
    assert report.train.tokens is not None
    assert (20 if report.train.kind == "preference" else 10) == sum(report.train.tokens.ends.values())


@pytest.mark.parametrize("method", ["dpo", "kto", "reward", "rloo", "grpo"])
def test_rows_are_refused_when_the_method_does_not_take_their_kind(tmp_path: Path, method: str) -> None:
    """Both sets, before anything waits for a model."""
    rows = [{"text": f"Once upon a time {word} met {word[::-1]}."} for word in WORDS]

    report = _inspect(tmp_path, rows, rows[:2], method=method, **_rl_options(method))

    for found in report.sets:
        (problem,) = found.problems
        assert problem.startswith(f"{found.name}: method {method} trains on ")
        assert problem.endswith("found text rows, which are for sft")


def test_rows_are_refused_when_kto_has_one_label_alone(tmp_path: Path) -> None:
    """To train on; rows that are only measured may all be good ones."""
    mixed, good = _labelled_rows([True, False] * 5), _labelled_rows([True] * 10)

    assert ("t: kto needs rows of both labels, found only true",) == _inspect(
        tmp_path, good, method="kto"
    ).train.problems
    report = _inspect(tmp_path, mixed, good[:3], method="kto")
    assert ((), ()) == tuple(found.problems for found in report.sets)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_prompts_are_refused_when_they_leave_no_room_for_an_answer(tmp_path: Path, method: str) -> None:
    """All of them by their lines; the same row is good for sft."""
    rows = [*_good_rows(), *[make_messages("q" * 110, "short")] * 25]

    report = _inspect(tmp_path, rows, method=method, max_length=200, max_answer_tokens=80, **_rl_options(method))

    (problem,) = report.train.problems
    assert problem.startswith("t: lines 11, 12, 13, 14, 15 and 20 more: ")
    assert problem.endswith(" tokens in the prompt; at most 120 leave room for max_answer_tokens within max_length")
    assert () == _inspect(tmp_path, rows, max_length=200).train.problems


def _rl_options(method: str) -> dict[str, Any]:
    return {"reward": "toy.py:toy", "batch_size": 8} if method in ("rloo", "grpo") else {}


def test_inspect_data_counts_tokens_without_rows_that_it_refuses(tmp_path: Path) -> None:
    """Figures and what is estimated from them are those of the rows that are left."""
    good = _inspect(tmp_path, _good_rows(), max_length=200).train

    found = _inspect(tmp_path, [*_good_rows(), make_messages("q", "a" * 300)], max_length=200).train

    assert 1 == len(found.problems)
    assert (11, 10) == (found.num_rows, found.num_fit_rows)
    assert good.tokens == found.tokens
    assert good.tokens is not None


def test_inspect_data_has_no_figures_when_every_row_is_refused(tmp_path: Path) -> None:
    """Nothing is estimated of nothing, and leaving rows out is no way."""
    report = _inspect(tmp_path, [make_messages("q", "a" * 300)], max_length=200)

    assert (0, None) == (report.train.num_fit_rows, report.train.tokens)
    assert () == report.unfit_sets


def test_inspect_data_refuses_fewer_prompts_than_a_step_takes_when_answers_are_sampled(tmp_path: Path) -> None:
    """TRL would find nothing to train on, in words that nobody understands; one prompt more is a step."""
    settings: dict[str, Any] = {"method": "rloo", "reward": "tone@v1", "batch_size": 8, "generations": 2}
    cure = "give more rows, a smaller batch_size or more generations"
    assert _inspect(tmp_path, _good_rows()[:3], **settings).train.problems == (
        "t: number of rows: 3; a step of rloo takes 4 prompts (batch_size * gradient_accumulation / generations): "
        + cure,
    )
    assert () == _inspect(tmp_path, _good_rows()[:4], **settings).train.problems


def test_inspect_data_asks_for_rows_that_teach_when_they_are_trained_on_alone(tmp_path: Path) -> None:
    """Nobody is taught by the validation rows; how few of them are too few, the gate says."""
    assert not any(
        "seldom teach" in warning for warning in _inspect(tmp_path, _good_rows(), _other_rows()[:9]).warnings
    )

"""Looks at training data before anything heavy is loaded: what stops a run, what its owner should know, and figures.

Needs a tokenizer and no model. Errors and warnings name file and line; personal data is counted, never shown.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adapters.chat_messages import Message
from adapters.chat_rows import ChatRow, LabelledRow, PreferenceRow, Row, RowKind, TextRow
from adapters.chat_template import RenderedRow, end_of_turn_id
from adapters.errors import DataError, InvalidInputError
from adapters.methods import ROW_KINDS, SAMPLING_METHODS
from adapters.row_places import PlacedProblem, RowPlace, data_error, group_problems, list_places
from training.config import TrainSettings
from training.duplicates import NEAR_SIMILARITY, find_duplicates
from training.formats import Dataset
from training.kinds import check_kind, check_labels, check_prompts
from training.personal_data import count_personal_data
from training.prompts import find_prompt_problems
from training.rendering import find_excess, render_row, token_rows

__all__ = ["Preflight", "SetReport", "TokenStatistics", "find_unfit_rows", "inspect_data", "run_preflight"]

# What came of one row: its rows of tokens, or why it has none.
_Result = Sequence[RenderedRow] | str

_MIN_ROWS = 10
_MIN_LOSS_SHARE = 0.01
_NUM_BINS = 10
_DUPLICATE_ADVICE = "hotswap data convert --drop-duplicates leaves them out"
_PERSONAL_ADVICE = "leave these rows out or mask it before training: a version may repeat what it has learned"
# The sign for a byte that could not be read, and what UTF-8 looks like when it is read as Windows-1252.
_DAMAGED = re.compile("\ufffd|Ã[\x80-\xbf\u2013-\u203a\u0152-\u017e]|Â[\xa0-\xbf]|â€")


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Tokens of those rows of one set that a run would take.

    Args:
        total: Of all rows together.
        shortest: Of one row, as are `median`, `p95` and `longest`.
        median: Half of the rows have no more.
        p95: 95 of 100 rows have no more.
        longest: The longest row's.
        loss_share: The share of tokens that carry loss, 0 to 1.
        histogram: Ranges of tokens a row, both ends included, and how many rows fall into each.
        starts: How often the beginning-of-sequence token occurs in a row -> how many rows.
        ends: How often a token that ends a turn carries loss in a row -> how many rows.
    """

    total: int
    shortest: int
    median: int
    p95: int
    longest: int
    loss_share: float
    histogram: tuple[tuple[int, int, int], ...]
    starts: Mapping[int, int]
    ends: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class SetReport:
    """What one set of rows looks like. `tokens` is None if no row can be trained on; `num_fit_rows` is how many can.

    `problems` stop a run; those that are a row's would be gone without the rows at `unfit_places`.
    """

    name: str
    recognised: str
    kind: RowKind
    num_rows: int
    num_fit_rows: int
    tokens: TokenStatistics | None
    personal_data: Mapping[str, int]
    problems: tuple[str, ...]
    unfit_places: tuple[RowPlace, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was found in the data of one run."""

    train: SetReport
    validation: SetReport | None

    @property
    def sets(self) -> tuple[SetReport, ...]:
        """The training data, and the validation data if there is any."""
        return (self.train,) if self.validation is None else (self.train, self.validation)

    @property
    def unfit_sets(self) -> tuple[SetReport, ...]:
        """Those with rows that can't be trained on, and with others beside them."""
        return tuple(found for found in self.sets if 0 < found.num_fit_rows < found.num_rows)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence each, beginning with the name of the set."""
        return tuple(warning for found in self.sets for warning in found.warnings)


def run_preflight(
    train: Dataset,
    validation: Dataset | None,
    *,
    tokenizer: Any,
    settings: TrainSettings,
    train_param: str | None = None,
    validation_param: str | None = None,
) -> Preflight:
    """Inspect the data of a run, and refuse what can't be trained on. `*_param` are the fields that named the data.

    Raises:
        DataError: rows that are too long, that the chat template refuses, or that train nothing: up to 20 by line, and
            a count of the rest; rows that the method does not take; or validation data of another kind.
    """
    report = inspect_data(train, validation, tokenizer=tokenizer, settings=settings)
    for found, param in zip(report.sets, (train_param, validation_param), strict=False):
        if found.problems:
            raise data_error(found.problems, param=param)
    return report


def inspect_data(train: Dataset, validation: Dataset | None, *, tokenizer: Any, settings: TrainSettings) -> Preflight:
    """The same without raising: problems stand in the report, in full."""
    found = [_inspect_set(data, tokenizer, settings) for data in (train, validation) if data is not None]
    if (few := _warn_of_few(train)) is not None:
        found[0] = replace(found[0], warnings=(few, *found[0].warnings))
    found[0] = replace(found[0], problems=(*found[0].problems, *_problems_of_set(train, settings)))
    if validation is None:
        return Preflight(found[0], None)
    return Preflight(found[0], _compare(train, validation, found[1]))


def find_unfit_rows(data: Dataset, *, tokenizer: Any, settings: TrainSettings) -> list[PlacedProblem]:
    """Rows that can't be trained on with these settings, and why: those that a run would refuse, in full.

    Rows that are too long, that the chat template refuses, or that train nothing. Of rloo and grpo prompts alone count:
    the answers in the rows are not trained on.
    """
    return _find_unfit(data, _render(data, tokenizer), tokenizer, settings)


def _inspect_set(data: Dataset, tokenizer: Any, settings: TrainSettings) -> SetReport:
    results = _render(data, tokenizer)
    unfit = _find_unfit(data, results, tokenizer, settings)
    problems = [*_problems_of_kind(data, settings), *group_problems(unfit, data.name)]
    unfit_places = dict.fromkeys(problem.place for problem in unfit)
    fit = [(place, rows) for place, rows in results if place not in unfit_places and not isinstance(rows, str)]
    rendered = [(place, row) for place, rows in fit for row in rows]
    warnings = [*_warn_of_rows(data), *_warn_of_tokens(rendered, tokenizer)]
    personal, found = _find_personal_data(data)
    tokens = _token_statistics([row for _, row in rendered], tokenizer) if rendered else None
    return SetReport(
        data.name,
        data.recognised,
        data.kind,
        len(data.rows),
        len(fit),
        tokens,
        personal,
        tuple(problems),
        tuple(unfit_places),
        tuple(f"{data.name}: {warning}" for warning in (*warnings, *found)),
    )


def _problems_of_kind(data: Dataset, settings: TrainSettings) -> list[str]:
    """Why the settings' method takes no rows of this kind."""
    try:
        check_kind(data, settings.method)
    except DataError as error:
        return error.problems
    return []


def _find_unfit(
    data: Dataset, results: Sequence[tuple[RowPlace, _Result]], tokenizer: Any, settings: TrainSettings
) -> list[PlacedProblem]:
    if settings.method in SAMPLING_METHODS and data.kind in ROW_KINDS[settings.method]:
        longest = settings.max_length - settings.max_answer_tokens
        return find_prompt_problems(tokenizer, data, max_length=longest)
    found: list[PlacedProblem] = []
    for place, rows in results:
        if isinstance(rows, str):
            found.append(PlacedProblem(place, rows))
        else:
            found += _check_tokens(rows, place, tokenizer, settings.max_length)
    return found


def _problems_of_set(train: Dataset, settings: TrainSettings) -> list[str]:
    """Why the method could learn nothing from these rows together; of rows of another kind that is told already."""
    labels = [numbered.row.label for numbered in train.rows if isinstance(numbered.row, LabelledRow)]
    try:
        if settings.method == "kto" and labels:
            check_labels(labels, train.name)
        if settings.method in SAMPLING_METHODS and train.kind in ROW_KINDS[settings.method]:
            check_prompts(len(train.rows), train.name, settings)
    except DataError as error:
        return error.problems
    return []


def _compare(train: Dataset, validation: Dataset, report: SetReport) -> SetReport:
    """The report of the validation data, with what shows only beside the training data."""
    problems, warnings = list(report.problems), list(report.warnings)
    if train.kind != validation.kind:
        problems.insert(0, f"{validation.name}: holds {validation.kind} rows, but {train.name} {train.kind} rows")
    num_train = len(train.rows)
    texts = [_full_text(numbered.row) for numbered in (*train.rows, *validation.rows)]
    repeated = [found for found in find_duplicates(texts) if found.index >= num_train > found.first]
    for is_exact, words in ((True, "rows that stand in"), (False, "rows that nearly equal one of")):
        places = [validation.rows[found.index - num_train].place for found in repeated if found.is_exact == is_exact]
        if places:
            effect = "the validation loss will look better than it is"
            warnings.append(f"{validation.name}: {words} {train.name}: {_count(places)}; {effect}")
    return replace(report, problems=tuple(problems), warnings=tuple(warnings))


def _render(data: Dataset, tokenizer: Any) -> list[tuple[RowPlace, _Result]]:
    """The rows' tokens with their places, also of those that are too long, or why there are none."""
    results: list[tuple[RowPlace, _Result]] = []
    for numbered in data.rows:
        try:
            rows = [row for result in render_row(tokenizer, numbered.row) for row in token_rows(result)]
        except InvalidInputError as error:
            results.append((numbered.place, str(error)))
        else:
            results.append((numbered.place, rows))
    return results


def _check_tokens(
    rows: Sequence[RenderedRow], place: RowPlace, tokenizer: Any, max_length: int
) -> Iterator[PlacedProblem]:
    if problem := find_excess(rows, place, max_length):
        yield problem
    if any(not any(row.loss_mask[1:]) for row in rows):
        yield PlacedProblem(place, "no token carries loss: the row would train nothing")
    bos = tokenizer.bos_token_id
    if bos is not None and any(row.input_ids[:2] == [bos, bos] for row in rows):
        text = "begins with the beginning-of-sequence token twice: the chat template and the text both write it"
        yield PlacedProblem(place, text)


def _warn_of_few(train: Dataset) -> str | None:
    """Of rows to validate with there may be fewer: nobody is taught by them."""
    if len(train.rows) >= _MIN_ROWS:
        return None
    return f"{train.name}: number of rows: {len(train.rows)}; fewer than {_MIN_ROWS} seldom teach a behaviour"


def _warn_of_rows(data: Dataset) -> Iterator[str]:
    places = [numbered.place for numbered in data.rows]
    duplicates = find_duplicates([_full_text(numbered.row) for numbered in data.rows])
    limit = f" in {NEAR_SIMILARITY:.0%} of their text or more"
    for is_exact, words in (
        (True, "rows that equal an earlier one"),
        (False, f"rows that equal an earlier one{limit}"),
    ):
        advice = f"; {_DUPLICATE_ADVICE}" if is_exact else ""
        if found := [places[duplicate.index] for duplicate in duplicates if duplicate.is_exact == is_exact]:
            yield f"{words}: {_count(found)}{advice}"
    if found := _contradictions(data):
        yield f"rows that ask what an earlier one asks, and answer otherwise: {_count(found)}"
    if found := [numbered.place for numbered in data.rows if _DAMAGED.search(_full_text(numbered.row))]:
        yield f"rows with signs of a wrong encoding, such as Ã£ or \ufffd: {_count(found)}"


def _contradictions(data: Dataset) -> list[RowPlace]:
    """Places of chat rows whose prompt an earlier row has with another answer."""
    answers: dict[str, str] = {}
    found: list[RowPlace] = []
    for numbered in data.rows:
        if isinstance(numbered.row, ChatRow):
            *prompt, answer = numbered.row.messages
            text = _joined([answer])
            if answers.setdefault(_joined(prompt), text) != text:
                found.append(numbered.place)
    return found


def _warn_of_tokens(rendered: Sequence[tuple[RowPlace, RenderedRow]], tokenizer: Any) -> Iterator[str]:
    ends = _end_ids(tokenizer)
    if found := [place for place, row in rendered if row.input_ids[-1] not in ends]:
        effect = "a model trained on them does not learn to stop"
        yield f"rows that do not end with a token that ends the turn: {_count(found)}; {effect}"
    num_tokens = sum(len(row.input_ids) for _, row in rendered)
    share = sum(sum(row.loss_mask) for _, row in rendered) / max(1, num_tokens)
    if rendered and share < _MIN_LOSS_SHARE:
        yield f"only {share:.1%} of the tokens carry loss: most of the time would go into reading prompts"


def _find_personal_data(data: Dataset) -> tuple[dict[str, int], list[str]]:
    """Counts by kind, and a warning for each kind with places."""
    counts: Counter[str] = Counter()
    places: dict[str, list[RowPlace]] = {}
    for numbered in data.rows:
        found = count_personal_data(_full_text(numbered.row))
        counts += found
        for kind in found:
            places.setdefault(kind, []).append(numbered.place)
    warnings = [
        f"likely personal data, {kind}: {count} found; rows: {_count(places[kind])}; {_PERSONAL_ADVICE}"
        for kind, count in counts.items()
    ]
    return dict(counts), warnings


def _token_statistics(rows: Sequence[RenderedRow], tokenizer: Any) -> TokenStatistics:
    lengths = np.array([len(row.input_ids) for row in rows])
    ends = _end_ids(tokenizer)
    return TokenStatistics(
        total=int(lengths.sum()),
        shortest=int(lengths.min()),
        median=int(np.percentile(lengths, 50, method="lower")),
        p95=int(np.percentile(lengths, 95, method="higher")),
        longest=int(lengths.max()),
        loss_share=sum(sum(row.loss_mask) for row in rows) / int(lengths.sum()),
        histogram=_histogram(lengths),
        starts=_occurrences(row.input_ids.count(tokenizer.bos_token_id) for row in rows),
        ends=_occurrences(
            sum(token in ends for token, loss in zip(row.input_ids, row.loss_mask, strict=True) if loss) for row in rows
        ),
    )


def _histogram(lengths: Any) -> tuple[tuple[int, int, int], ...]:
    """Ranges of equal width: ten, or fewer where there are few rows or lengths."""
    least, most = int(lengths.min()), int(lengths.max())
    width = -(-(most - least + 1) // min(_NUM_BINS, math.isqrt(len(lengths)) + 1))
    counts = Counter(((lengths - least) // width).tolist())
    ranges = range(-(-(most - least + 1) // width))
    return tuple((least + n * width, least + (n + 1) * width - 1, counts[n]) for n in ranges)


def _occurrences(numbers: Iterator[int]) -> dict[int, int]:
    return dict(sorted(Counter(numbers).items()))


def _end_ids(tokenizer: Any) -> set[int | None]:
    return {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}


def _full_text(row: Row) -> str:
    match row:
        case ChatRow():
            return _joined(row.messages)
        case TextRow():
            return row.text
        case PreferenceRow():
            return _joined([*row.prompt, row.chosen, row.rejected])
        case LabelledRow():
            return f"{_joined([*row.prompt, row.completion])}\n{row.label}"


def _joined(messages: Sequence[Message]) -> str:
    """All that is said, each message with its role and its calls."""
    return "\n".join(
        f"{message['role']}: {message['content']}"
        + (json.dumps(message["tool_calls"], ensure_ascii=False) if "tool_calls" in message else "")
        for message in messages
    )


def _count(places: Sequence[RowPlace]) -> str:
    """How many rows, and where the first of them are."""
    return f"{len(set(places))} ({list_places(places)})"

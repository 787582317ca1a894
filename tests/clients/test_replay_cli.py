"""`hotswap experiments replay` against a real server in this process: answers, rules, judges, a crash in between."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import ConfigurationError, InvalidInputError
from adapters.registry import Registry
from adapters.tables import ConversationRow
from clients.cli.judging import Journal
from clients.cli.main import app
from clients.cli.replay import conclude
from clients.errors import ApiError
from clients.judge import Verdict
from server.messages import SubmitCommand
from tests.support.chat_endpoint import chat_endpoint
from tests.support.engine import RECIPES, Bench, Site, make_bench, save_recipes
from tests.support.http import ServedSite, serve_site

FIRST, SECOND, THIRD, *_ = RECIPES
PROMPTS = ["hello there", "how do you do", "and then", "what is it"]


@pytest.fixture(scope="module")
def bench(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny Llama for this file."""
    folder = tiny_folders["llama"]
    return make_bench(folder, save_recipes(tmp_path_factory.mktemp("adapters"), folder))


@pytest.fixture
def published(bench: Bench, registry: Registry, tmp_path: Path) -> Iterator[Site]:
    """A server that keeps conversations, whose `legal` has three versions."""
    site = Site.build(bench, registry, tmp_path / "home", keep_conversations=True)
    for recipe in (FIRST, SECOND, THIRD):
        site.publish("legal", recipe)
    yield site
    site.engine.close()


def _prompts(folder: Path, references: list[str]) -> Path:
    path = folder / "prompts.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reference}]}
        for prompt, reference in zip(PROMPTS, references, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _replay(url: str, folder: Path, *options: str, prompts: Path | None = None) -> dict[str, Any]:
    source = prompts or _prompts(folder, ["x"] * len(PROMPTS))
    arguments = ["experiments", "replay", "legal", "--a", "v1", "--b", "v2", "--prompts", str(source), "--url", url]
    output = folder / "report.json"
    result = CliRunner().invoke(
        app, [*arguments, "--output", str(output), "--max-tokens", "5", *options], env={"COLUMNS": "200"}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert 0 == result.exit_code, result.output
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def _num_asked(served: ServedSite) -> int:
    return sum(isinstance(command, SubmitCommand) for command in served.site.transport.commands)


def _journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["value"] for line in (folder / "report.answers.jsonl").read_text().splitlines()]


def test_versions_are_compared_by_rules_when_prompts_have_references(published: Site, tmp_path: Path) -> None:
    """Each version's greedy answers, the reference of the first: it wins every prompt on which they differ."""
    with serve_site(published) as served:
        _replay(served.root, tmp_path, "--concurrency", "1")
        answers = [entry["text"] for entry in _journal(tmp_path)]
        ours, theirs = answers[::2], answers[1::2]
        assert ours != theirs
        report = _replay(served.root, tmp_path, prompts=_prompts(tmp_path, [f" {text} " for text in ours]))
    (exact, length) = (measure["comparisons"][0] for measure in report["measures"])
    num_different = sum(one.strip() != other.strip() for one, other in zip(ours, theirs, strict=True))
    assert (num_different, 0, 4 - num_different) == (exact["wins"], exact["losses"], exact["ties"])
    assert ("legal@v1", "legal@v2", 4) == (exact["first"], exact["second"], length["num_prompts"])
    assert sum(map(len, ours)) / 4 - sum(map(len, theirs)) / 4 == pytest.approx(length["mean_difference"])
    assert [("legal@v1", 4, 0), ("legal@v2", 4, 0)] == [
        (version["version"], version["num_answers"], version["num_failed"]) for version in report["versions"]
    ]


@pytest.mark.parametrize(
    ("win_rate", "interval", "said"),
    [
        (0.9, {"low": 0.7, "high": 1.0}, "v1 wins more often than v2."),
        (0.1, {"low": 0.0, "high": 0.3}, "v2 wins more often than v1."),
        (0.6, {"low": 0.4, "high": 0.8}, "neither v1 nor v2 is shown to win more often."),
        (0.9, None, "neither v1 nor v2 is shown to win more often."),
    ],
)
def test_replay_concludes_in_a_sentence_when_all_answers_are_there(
    win_rate: float, interval: dict[str, float] | None, said: str
) -> None:
    """For whoever reads no p-values; half is what chance gives. Answers that were cut are warned of."""
    found = {"first": "v1", "second": "v2", "num_prompts": 40, "win_rate": win_rate, "win_interval": interval}
    versions = [
        {"version": "v1", "num_answers": 40, "num_cut": 20},
        {"version": "v2", "num_answers": 40, "num_cut": 19},
    ]
    report = {"measures": [{"name": "length", "comparisons": [found]}], "versions": versions}
    told, warned = conclude(report)
    assert f"By length, over 40 prompts: {said}" == told
    assert warned.startswith("20 of 40 answers of v1 were cut at the limit of tokens")


def test_replay_asks_for_what_is_missing_alone_when_an_earlier_run_was_cut(published: Site, tmp_path: Path) -> None:
    """Whole lines of the journal are used, half a line is not, and the report is the same."""
    with serve_site(published) as served:
        whole = _replay(served.root, tmp_path)
        asked = _num_asked(served)
        journal = tmp_path / "report.answers.jsonl"
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(lines[:5]) + lines[5][:20])
        again = _replay(served.root, tmp_path)
        assert (8, 3) == (asked, _num_asked(served) - asked)
        assert whole == again
        _replay(served.root, tmp_path, "--fresh")
        assert 11 + 8 == _num_asked(served)
    assert 0o600 == journal.stat().st_mode & 0o777


def test_replay_is_refused_when_the_journal_is_of_another_version_or_none_at_all(
    published: Site, tmp_path: Path
) -> None:
    """The same name on another server may be another version; and a file of the user's is not written over."""
    journal = tmp_path / "report.answers.jsonl"
    with serve_site(published) as served:
        report = _replay(served.root, tmp_path)
        assert [item.version.digest for item in published.registry.versions("legal")][:2] == [
            version["digest"] for version in report["versions"]
        ]
        # One answer of the first version; which line it has depends on who was faster.
        journal.write_text(journal.read_text().replace(report["versions"][0]["digest"], "f" * 64, 1))
        with pytest.raises(InvalidInputError, match=r"another legal@v1 than this server has.*--fresh"):
            _replay(served.root, tmp_path)
    for text in ("dear diary\n", '{"messages": []}\n', "[]\n[]\n"):
        journal.write_text(text)
        with pytest.raises(InvalidInputError, match="line 1: expected what a replay has kept"):
            _replay("http://127.0.0.1:1", tmp_path)
        assert text == journal.read_text()


def test_prompt_counts_once_when_the_file_asks_it_twice(published: Site, tmp_path: Path) -> None:
    """Greedy answers to the same prompt are the same: they would only make everything look surer."""
    source = _prompts(tmp_path, ["x"] * 4)
    source.write_text(source.read_text() * 3)
    with serve_site(published) as served:
        report = _replay(served.root, tmp_path, prompts=source)
        assert 8 == _num_asked(served)
    assert (4, 8) == (report["prompts"]["count"], report["prompts"]["num_repeated"])
    assert {4} == {measure["comparisons"][0]["num_prompts"] for measure in report["measures"]}


def test_replay_fails_when_nothing_could_be_compared(published: Site, tmp_path: Path) -> None:
    """With the server's own reason; a report of nothing would look like a tie."""
    source = _prompts(tmp_path, ["x"] * 4)
    source.write_text(source.read_text().replace('"hello', '"' + "long " * 100))
    with (
        serve_site(published) as served,
        pytest.raises(InvalidInputError, match=r"could be compared.*first error.*128"),
    ):
        _replay(served.root, tmp_path, "--limit", "1", prompts=source)
    assert not (tmp_path / "report.json").exists()
    assert [] == _journal(tmp_path)


def test_answers_stay_when_the_server_goes_away(published: Site, tmp_path: Path) -> None:
    """The error is raised, and what was answered is in the journal for the next run."""
    _prompts(tmp_path, ["x"] * 4)
    with serve_site(published) as served:
        _replay(served.root, tmp_path, "--limit", "2")
        url = served.root
    with pytest.raises(ApiError):
        _replay(url, tmp_path)
    assert 4 == len(_journal(tmp_path))


def test_replay_leaves_no_conversation_when_the_server_keeps_them(published: Site, tmp_path: Path) -> None:
    """What is asked for a comparison is no feedback of anybody's; its requests decline to be kept."""
    with serve_site(published) as served:
        _replay(served.root, tmp_path, "--limit", "1")
    with published.registry.database.read() as session:
        assert 0 == session.query(ConversationRow).count()
    assert 2 == len(published.exposures())


def test_failed_answer_counts_for_nobody_when_a_prompt_is_too_long(published: Site, tmp_path: Path) -> None:
    """The others are compared all the same."""
    source = _prompts(tmp_path, ["x"] * 4)
    lines = source.read_text().splitlines()
    lines[1] = lines[1].replace(PROMPTS[1], "long " * 100)
    source.write_text("\n".join(lines) + "\n")
    with serve_site(published) as served:
        report = _replay(served.root, tmp_path, prompts=source)
    assert [(3, 1), (3, 1)] == [(item["num_answers"], item["num_failed"]) for item in report["versions"]]
    assert {3} == {measure["comparisons"][0]["num_prompts"] for measure in report["measures"]}
    assert 6 == len(_journal(tmp_path))  # with another limit the fourth may go well


def test_function_judges_three_versions_when_given(published: Site, tmp_path: Path) -> None:
    """As a reward does: answers, prompts and references in, a number each out; every pair, and ratings where finite."""
    judge = tmp_path / "judges.py"
    judge.write_text(
        "def letters(completions, prompts, references):\n"
        "    assert references == ['x'] * len(completions)\n"
        "    assert prompts[0][-1]['content'] == 'hello there'\n"
        "    return [sum(map(str.isalpha, text)) for text in completions]\n"
        "def broken(completions, prompts, references):\n"
        "    return [1 / 0 for text in completions]\n"
    )
    with serve_site(published) as served:
        report = _replay(served.root, tmp_path, "--also", "v3", "--judge", f"{judge}:letters")
        (measure,) = report["measures"]
        assert "function judges.py:letters" == measure["name"]
        assert 3 == len(measure["comparisons"])
        with pytest.raises(ConfigurationError, match=r"--judge: judges.py:broken failed: ZeroDivisionError.*line 6"):
            _replay(served.root, tmp_path, "--judge", f"{judge}:broken")


@pytest.mark.parametrize(
    ("says", "wins", "places", "unreadable"),
    [
        (lambda asked: "1", 0, (4, 0), 0),
        (lambda asked: "I choose answer 2", 0, (0, 4), 0),
        (lambda asked: "both are fine", 0, (0, 0), 4),
        (lambda asked: "Answer 1 is better than answer 2.", 0, (0, 0), 4),
        (lambda asked: "Answer 2 is short, answer 1 is not.\n\n**1**\n", 0, (4, 0), 0),
        (lambda asked: "1" if asked.index("splendid") < asked.index("poor") else "2", 4, (0, 0), 0),
    ],
    ids=["first place", "second place", "no verdict", "both digits", "behind reasoning", "the better answer"],
)
def test_judge_model_sees_both_orders_when_it_compares(
    says: Callable[[str], str], wins: int, places: tuple[int, int], unreadable: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """One that goes by the place decides nothing, and its bias is reported; our own server's key stays here."""
    monkeypatch.setenv("HOTSWAP_API_KEY", "hs-secret")
    with chat_endpoint(lambda body: f"{'splendid' if body['model'] == 'legal@v1' else 'poor'} answer") as answering:
        _replay(answering.url, tmp_path)
        with chat_endpoint(lambda body: says(body["messages"][-1]["content"])) as judging:
            options = ("--judge", "some-judge", "--judge-url", f"{judging.url}/v1")
            report = _replay(answering.url, tmp_path, *options)
            assert 8 == len(judging.bodies)
            _replay(answering.url, tmp_path, *options)
            assert 8 == len(judging.bodies)  # verdicts are in the journal, too
    (measure,) = report["measures"]
    (found,) = measure["comparisons"]
    bias = measure["position_bias"]
    assert (wins, 0, 4 - wins) == (found["wins"], found["losses"], found["ties"])
    assert places == (bias["first_place_won_both"], bias["second_place_won_both"])
    assert (4, unreadable) == (bias["num_pairs"], bias["unreadable"])
    assert ({"Bearer hs-secret"}, {None}) == (set(answering.keys), set(judging.keys))
    assert ({False}, {None}) == (
        {body.get("store") for body in answering.bodies}, {body.get("store") for body in judging.bodies},
    )  # fmt: skip


def test_replay_fails_when_the_judge_refuses_every_pair(tmp_path: Path) -> None:
    """A judge that takes no request at all would make a tie of everything; one long prompt is a tie."""
    with chat_endpoint(lambda body: f"{body['model']} says {body['messages'][-1]['content']}") as answering:
        with chat_endpoint(lambda body: None) as refusing:
            options = ("--judge", "some-judge", "--judge-url", refusing.url)
            with pytest.raises(
                InvalidInputError, match="some-judge refused every pair; the first reason: no such form"
            ):
                _replay(answering.url, tmp_path, *options)
        says = lambda body: None if PROMPTS[0] in body["messages"][-1]["content"] else "0"  # noqa: E731
        with chat_endpoint(says) as judging:
            report = _replay(answering.url, tmp_path, "--judge", "some-judge", "--judge-url", judging.url)
    (measure,) = report["measures"]
    assert (4, 1) == (measure["comparisons"][0]["ties"], measure["position_bias"]["unreadable"])


def test_base_is_asked_again_when_the_server_is_another(tmp_path: Path) -> None:
    """Its answers have no digest by which a journal could tell them from those of another base model."""
    source = _prompts(tmp_path, ["x"] * len(PROMPTS))
    arguments = ["experiments", "replay", "legal", "--a", "v1", "--b", "base", "--prompts", str(source)]
    output = ["--output", str(tmp_path / "report.json")]
    num_asked = []
    with chat_endpoint(lambda body: "one") as first, chat_endpoint(lambda body: "another") as second:
        for url in (first.url, first.url, second.url):
            result = CliRunner().invoke(app, [*arguments, *output, "--url", url], env={"COLUMNS": "200"})
            assert 0 == result.exit_code, result.output
            num_asked.append([len(endpoint.bodies) for endpoint in (first, second)])
        assert [[8, 0], [8, 0], [8, 4]] == num_asked
        assert {"base"} == {body["model"] for body in second.bodies}


def test_error_is_a_sentence_when_the_journal_can_not_be_written_any_more(tmp_path: Path) -> None:
    """As on a disk that is full in the midst of a run."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InvalidInputError, match=r"journal\.jsonl can't be written: Is a directory"):
        journal.add("key", {})


@pytest.mark.parametrize(
    ("as_given", "turned", "score", "place"),
    [
        ("first", "second", 1.0, None),
        ("second", "first", 0.0, None),
        ("first", "first", 0.5, "first"),
        ("second", "second", 0.5, "second"),
        ("first", "tie", 0.5, None),
        ("tie", "tie", 0.5, None),
        ("unreadable", "first", 0.5, None),
    ],
)
def test_answer_wins_when_it_is_preferred_in_both_orders(
    as_given: Any, turned: Any, score: float, place: str | None
) -> None:
    """Anything less is a tie; the same place twice is a sign of bias."""
    verdict = Verdict(as_given, turned)
    assert (score, place) == (verdict.score, verdict.follows_place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--also", "v1"), "expected different versions"),
        (("--rule", "nice"), "expected one of exact, length, format"),
        (("--rule", "format"), "--rule format goes with"),
        (("--answer-pattern", "x"), "--rule format goes with"),
        (("--rule", "format", "--answer-pattern", "("), "the answers' form"),
        (("--also", "legal"), "is not a version"),
    ],
)
def test_replay_is_refused_before_anything_is_asked_when_options_are_wrong(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    """There is no server here that could be asked."""
    with pytest.raises(InvalidInputError, match=message):
        _replay("http://127.0.0.1:1", tmp_path, *options)

"""`hotswap data` in process: what is written, shown and told of training data."""

from __future__ import annotations

import errno
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from adapters.errors import ConfigurationError, ConflictError, DataError
from clients.cli.main import app, main
from tests.support.conversations import make_messages, write_rows
from tests.support.tiny import make_tokenizer

CSV = 'frage;antwort\nq;a\n\nr;"b; c"\n'
MAPPED = ("--map", "user=frage,assistant=antwort")


@pytest.fixture
def base(tiny_folders: dict[str, Path]) -> tuple[str, str]:
    """The option that names a tiny base model."""
    return "--base", str(tiny_folders["llama"])


def _run(home: Path, *arguments: str) -> Result:
    """Run a command that may end with any status, but with no error of ours."""
    environment = {"HOTSWAP_HOME": str(home), "COLUMNS": "200", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, ["data", *arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _train(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> list[str]:
    """What a run that is refused says, line by line."""
    monkeypatch.setattr("sys.argv", ["hotswap", "train", "tickets", "--home", str(home), *arguments])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().err.splitlines()


def _write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_data_convert_writes_rows_when_columns_are_mapped(tmp_path: Path) -> None:
    """One row a line, in the form that training and uploads take; what was recognised is said."""
    source, out = _write(tmp_path / "d.csv", CSV), tmp_path / "out.jsonl"

    result = _run(tmp_path, "convert", source, str(out), *MAPPED)

    assert [{"messages": make_messages("q", "a")}, {"messages": make_messages("r", "b; c")}] == [
        json.loads(line) for line in out.read_text().splitlines()
    ]
    assert f"2 chat rows written to {out}\n" == result.stdout
    assert f"{source}: 2 rows; CSV with semicolons: mapped to chat (user = frage, assistant = antwort)" in result.stderr


def test_train_reads_a_csv_when_columns_are_mapped(tmp_path: Path, base: tuple[str, str]) -> None:
    """From a table of one's own to a published version, with no step between; what was recognised is said first."""
    source = _write(tmp_path / "d.csv", CSV)
    environment = {"HOTSWAP_HOME": str(tmp_path / "home"), "HOTSWAP_QUANTISATION": "none", "COLUMNS": "200"}
    arguments = ["train", "tickets", "--data", source, *MAPPED, *base, "--max-steps", "1", "--json"]

    result = CliRunner().invoke(app, arguments, env=environment)

    assert 0 == result.exit_code, result.output
    document = json.loads(result.stdout)
    assert ("tickets@v1", 2) == (document["published"]["label"], document["num_rows"])
    assert f"{source}: 2 rows; CSV with semicolons: mapped to chat (user = frage, assistant = antwort)" in result.stderr
    assert f"warning: {source}: number of rows: 2; fewer than 10 seldom teach a behaviour" in result.stderr


def test_train_says_what_shows_every_problem_when_rows_are_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below the error, for whoever has only this command."""
    source = _write(tmp_path / "d.csv", CSV + "s;\n")
    options = (*MAPPED, "--encoding", "utf-8", "--max-length", "200")

    told = _train(tmp_path, monkeypatch, capsys, "--data", source, *options)

    assert f"error: {source}:5: field antwort: is empty" == told[-2]
    reading, settings = options[:-2], options[-2:]
    command = shlex.join(["hotswap", "data", "check", source, *reading, "--home", str(tmp_path), *settings])
    assert f"every problem, and how to leave rows out: {command}" == told[-1]


def test_train_says_what_shows_every_problem_when_rows_are_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: tuple[str, str]
) -> None:
    """The command is one that ends with the same error, by the same settings."""
    source = str(write_rows(tmp_path / "d.jsonl", [make_messages("q", "a"), make_messages("q", "a" * 300)]))

    told = _train(tmp_path, monkeypatch, capsys, "--data", source, *base, "--max-length", "200")

    assert told[-1].startswith(f"every problem, and how to leave rows out: hotswap data check {source} --home ")
    assert " --base " in told[-1]
    result = _run(tmp_path, *told[-1].partition("hotswap data ")[2].split())
    assert told[-2].removeprefix("error: ") in result.stdout


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, (), "can't be read: No such file or directory"),
        ("", (), "holds no rows"),
        (CSV, ("--map", "user=nowhere,assistant=antwort"), "has no column 'nowhere'"),
        (CSV, (*MAPPED, "--method", "dpo"), "method dpo trains on preference rows"),
    ],
    ids=["no-file", "empty", "wrong-column", "wrong-method"],
)
def test_train_gives_no_command_when_no_row_is_at_fault(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    options: tuple[str, ...],
    message: str,
) -> None:
    """`data check` would end with the very same sentence."""
    path = tmp_path / "d.csv"
    if content is not None:
        path.write_text(content)

    told = _train(tmp_path, monkeypatch, capsys, "--data", str(path), *options)

    assert message in told[-1]
    assert told[-1].startswith("error: ")


def test_data_convert_leaves_a_file_alone_when_it_exists(tmp_path: Path) -> None:
    """Nothing of the user's is overwritten without --force, and nothing half-written is left beside it."""
    source, out = _write(tmp_path / "d.csv", CSV), tmp_path / "out.jsonl"
    out.write_text("mine")

    with pytest.raises(ConflictError, match=rf"^{out} exists already; --force writes over it$"):
        _run(tmp_path, "convert", source, str(out), *MAPPED)
    assert "mine" == out.read_text()
    assert ["d.csv", "out.jsonl"] == sorted(path.name for path in tmp_path.iterdir())

    _run(tmp_path, "convert", source, str(out), *MAPPED, "--force")
    assert 2 == len(out.read_text().splitlines())


def test_data_convert_says_how_to_leave_rows_out_when_some_are_bad(tmp_path: Path) -> None:
    """And how many rows would be kept; where none would be there is nothing to advise."""
    source = _write(tmp_path / "d.csv", "question,answer\nq,a\nr,\ns,\n")

    with pytest.raises(DataError, match="lines 3, 4: field answer: is empty") as caught:
        _run(tmp_path, "convert", source, str(tmp_path / "out.jsonl"))
    assert ["mend these rows; --drop-bad leaves them out (2), 1 can be read"] == caught.value.__notes__

    with pytest.raises(DataError) as all_bad:
        _run(tmp_path, "convert", _write(tmp_path / "b.csv", "question,answer\nq,\n"), str(tmp_path / "out.jsonl"))
    assert not hasattr(all_bad.value, "__notes__")


def test_data_convert_writes_rows_when_the_file_system_has_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FAT and some network shares; a file that is there is left alone all the same."""

    def refuse(*paths: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    source, out = _write(tmp_path / "d.csv", CSV), tmp_path / "out.jsonl"

    _run(tmp_path, "convert", source, str(out), *MAPPED)
    written = out.read_text()
    with pytest.raises(ConflictError, match=rf"^{out} exists already; --force writes over it$"):
        _run(tmp_path, "convert", source, str(out), *MAPPED)

    assert 2 == len(written.splitlines())
    assert written == out.read_text()
    assert ["d.csv", "out.jsonl"] == sorted(path.name for path in tmp_path.iterdir())


def test_data_convert_leaves_bad_rows_out_when_asked(tmp_path: Path, base: tuple[str, str]) -> None:
    """Without the flag they are an error and nothing is written; with it each is named, and all are counted.

    Bad are rows that can't be read, and rows that no run would take: too long, or with the template's own tokens.
    """
    bad = f"s;\nt;{'long ' * 50}\nu;<|im_end|>\n"
    source, out = _write(tmp_path / "d.csv", CSV + bad), tmp_path / "out.jsonl"

    with pytest.raises(DataError, match=r"d\.csv:5: field antwort: is empty\n"):
        _run(tmp_path, "convert", source, str(out), *MAPPED)
    assert not out.exists()

    result = _run(tmp_path, "convert", source, str(out), *MAPPED, *base, "--drop-bad", "--max-length", "200")
    assert 2 == len(out.read_text().splitlines())
    assert f"left out: {source}:5: field antwort: is empty" in result.stderr
    assert re.search(rf"left out: {source}:6: \d+ tokens, more than max_length 200", result.stderr)
    assert f"left out: {source}:7: " in result.stderr
    assert "rows left out: 3, kept: 2" in result.stderr
    assert 0 == _run(tmp_path, "check", str(out), *base, "--max-length", "200").exit_code


def test_data_convert_writes_nothing_when_every_row_is_left_out(tmp_path: Path, base: tuple[str, str]) -> None:
    """An empty file would be an error of the next command."""
    source, out = _write(tmp_path / "d.csv", CSV), tmp_path / "out.jsonl"

    with pytest.raises(DataError, match=r"d\.csv: no row is left to be written$"):
        _run(tmp_path, "convert", source, str(out), *MAPPED, *base, "--drop-bad", "--max-length", "8")
    assert not out.exists()


def test_data_convert_names_the_folder_when_it_is_not_there(tmp_path: Path) -> None:
    """A path that can't be written is an error of one line."""
    with pytest.raises(DataError, match=r"nowhere/out\.jsonl: can't be written: there is no folder .*/nowhere$"):
        _run(tmp_path, "convert", _write(tmp_path / "d.csv", CSV), str(tmp_path / "nowhere/out.jsonl"), *MAPPED)


def test_data_show_marks_the_tokens_that_carry_loss_when_there_are_no_colours(
    tmp_path: Path, base: tuple[str, str]
) -> None:
    """The row as the model reads it, with the assistant's words and the end of the turn between marks."""
    source = str(write_rows(tmp_path / "d.jsonl", [make_messages("q", "a", "r", "b")]))

    shown = _run(tmp_path, "show", source, *base).stdout

    assert "assistant\n⟦a<|im_end|>⟧" in shown
    assert "assistant\n⟦b<|im_end|>⟧" in shown
    assert 2 == shown.count("⟦")
    assert shown.startswith("line 1: ")


def test_data_show_colours_the_tokens_that_carry_loss_when_it_writes_to_a_terminal(
    tmp_path: Path, base: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Green and bold where there is loss, dim elsewhere; no marks between."""
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    monkeypatch.setattr("clients.cli.data.console", terminal)
    source = str(write_rows(tmp_path / "d.jsonl", [make_messages("q", "a")]))

    _run(tmp_path, "show", source, *base)

    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    assert "\x1b[1;32ma<|im_end|>\x1b[0m" in shown
    assert "\x1b[2m" in shown
    assert "⟦" not in shown


def test_data_show_gives_tokens_and_mask_when_json_is_asked_for(tmp_path: Path, base: tuple[str, str]) -> None:
    """Both answers of a preference, each with all of its tokens; no more rows than asked for."""
    row = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    source = str(write_rows(tmp_path / "d.jsonl", [row, row]))

    documents: list[dict[str, Any]] = json.loads(_run(tmp_path, "show", source, *base, "--rows", "1", "--json").stdout)

    assert ["yes<|im_end|>", "no<|im_end|>"] == [document["spans"][-1]["text"] for document in documents]
    for document in documents:
        assert len(document["input_ids"]) == len(document["loss_mask"])
        spoken = [t for t, loss in zip(document["input_ids"], document["loss_mask"], strict=True) if loss]
        assert document["spans"][-1]["text"] == make_tokenizer().decode(spoken)


def test_data_check_ends_with_status_one_when_rows_are_bad(tmp_path: Path, base: tuple[str, str]) -> None:
    """Everything is told at once: rows that can't be read, rows that are too long, and the figures of the others."""
    rows = [make_messages("q", "a"), make_messages("q", "b" * 300), make_messages("q")]
    source = str(write_rows(tmp_path / "d.jsonl", rows))

    result = _run(tmp_path, "check", source, *base, "--max-length", "200")

    assert 1 == result.exit_code
    assert f"error: {source}:3: field messages: expected user and assistant in turn" in result.stdout
    assert f"error: {source}:2: " in result.stdout
    assert "tokens, more than max_length 200" in result.stdout
    assert f"{source}: 2 chat rows; JSON lines: chat (messages = messages)" in result.stdout
    assert "errors: 2, warnings: 2" in result.stdout
    advice = result.stdout[result.stdout.index("hotswap data convert") :].splitlines()[0]
    assert f"hotswap data convert {source} OUT.jsonl --drop-bad --max-length 200" == advice
    out = tmp_path / "out.jsonl"
    _run(tmp_path, *advice.replace("OUT.jsonl", str(out)).split()[2:], *base)
    assert 0 == _run(tmp_path, "check", str(out), *base, "--max-length", "200").exit_code


def test_data_check_reports_both_sets_when_validation_is_given(tmp_path: Path, base: tuple[str, str]) -> None:
    """In JSON with every figure; good data ends with status 0."""
    train = str(write_rows(tmp_path / "t.jsonl", [make_messages(f"q{n}", "a") for n in range(12)]))
    valid = str(write_rows(tmp_path / "v.jsonl", [make_messages("q3", "a")]))

    result = _run(tmp_path, "check", train, "--validation", valid, *base, "--json")

    document = json.loads(result.stdout)
    assert (0, []) == (result.exit_code, document["problems"])
    assert (12, 1) == (document["report"]["train"]["num_rows"], document["report"]["validation"]["num_rows"])
    assert f"{valid}: rows that stand in {train}: 1 (line 1); " in "".join(document["warnings"])


def test_data_check_names_the_lines_when_no_row_can_be_read(tmp_path: Path, base: tuple[str, str]) -> None:
    """There are no figures of nothing."""
    source = str(write_rows(tmp_path / "d.jsonl", [make_messages("q")]))

    result = _run(tmp_path, "check", source, *base)

    assert 1 == result.exit_code
    assert "errors: 1, warnings: 0" in result.stdout


_PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
_LABELLED = [{"prompt": "q", "completion": "yes", "label": label} for label in (True, False)]


@pytest.mark.parametrize(
    ("rows", "method", "others"),
    [
        ([_PAIR], "dpo", "; --method reward takes such rows, too"),
        (_LABELLED, "kto", ""),
        ([make_messages("q", "a")], "sft", "; --method rloo or grpo takes such rows, too"),
    ],
)
def test_data_check_takes_the_method_from_the_rows_when_none_is_named(
    tmp_path: Path, base: tuple[str, str], rows: list[Any], method: str, others: str
) -> None:
    """Rows that are right for what they are for are right; which method was meant is said."""
    source = str(write_rows(tmp_path / "d.jsonl", rows))

    result = _run(tmp_path, "check", source, *base)

    assert 0 == result.exit_code, result.stdout
    assert f"method: {method}, the usual one for such rows{others}\n" in result.stdout
    assert method == json.loads(_run(tmp_path, "check", source, *base, "--json").stdout)["method"]


def test_data_check_keeps_to_the_method_when_one_is_named(tmp_path: Path, base: tuple[str, str]) -> None:
    """By flag or in the home's settings; rows of another kind are the error, and leaving some out is no advice."""
    source = str(write_rows(tmp_path / "d.jsonl", [_PAIR]))

    result = _run(tmp_path, "check", source, *base, "--method", "kto")

    assert 1 == result.exit_code
    assert "error: " in result.stdout
    assert "method kto trains on labelled rows, found preference rows, which are for dpo, reward" in result.stdout
    assert "--drop-bad" not in result.stdout
    (tmp_path / "hotswap.toml").write_text('[train]\nmethod = "kto"\n')
    assert 1 == _run(tmp_path, "check", source, *base).exit_code


def test_data_check_looks_at_prompts_alone_when_answers_are_to_be_sampled(
    tmp_path: Path, base: tuple[str, str]
) -> None:
    """An answer in the row is not trained on by rloo, however long it is; its prompt must leave room for another."""
    source = str(write_rows(tmp_path / "d.jsonl", [make_messages("q", "b" * 300), make_messages("p" * 180, "a")]))
    sampling = ("--method", "rloo", "--reward", "tone@v1", "--max-answer-tokens", "20", "--max-length", "200")

    result = _run(tmp_path, "check", source, *base, *sampling)

    assert "errors: 1, " in result.stdout
    assert re.search(rf"error: {source}:2: \d+ tokens in the prompt; at most 180 leave room", result.stdout)


def test_data_commands_take_roles_when_speakers_have_names_of_their_own(tmp_path: Path, base: tuple[str, str]) -> None:
    """What check says to give is what check, show, convert and train take; a run's file has the key `roles`."""
    turns = [{"from": "customer", "value": "q"}, {"from": "agent", "value": "a"}]
    source, out = str(write_rows(tmp_path / "d.jsonl", [{"conversation": turns}] * 3)), tmp_path / "out.jsonl"
    roles = ("--roles", "customer=user,agent=assistant")

    refused = _run(tmp_path, "check", source, *base)

    assert 1 == refused.exit_code
    assert "errors: 1, warnings: 0" in refused.stdout
    assert "--roles customer=ROLE,agent=ROLE" in refused.stdout
    assert 0 == _run(tmp_path, "check", source, *base, *roles).exit_code
    assert "⟦a<|im_end|>⟧" in _run(tmp_path, "show", source, *base, *roles).stdout
    assert f"3 chat rows written to {out}\n" == _run(tmp_path, "convert", source, str(out), *roles).stdout
    config = _write(tmp_path / "run.yaml", f"alias: t\ndata: {source}\nroles: {{customer: user, agent: assistant}}\n")
    environment = {"HOTSWAP_HOME": str(tmp_path / "home"), "HOTSWAP_QUANTISATION": "none"}
    arguments = ["train", "--config", config, *base, "--max-steps", "1", "--json"]
    trained = CliRunner().invoke(app, arguments, env=environment)
    assert 3 == json.loads(trained.stdout)["num_rows"], trained.output


def test_data_check_gives_no_advice_to_leave_rows_out_when_every_row_is_bad(
    tmp_path: Path, base: tuple[str, str]
) -> None:
    """Nothing would be left to be written, whether rows can't be read or are too long."""
    unread = str(write_rows(tmp_path / "d.jsonl", [make_messages("q")] * 2))
    long = str(write_rows(tmp_path / "e.jsonl", [make_messages("q", "a" * 300)] * 2))

    for source in (unread, long):
        result = _run(tmp_path, "check", source, *base, "--max-length", "200")
        assert 1 == result.exit_code
        assert "--drop-bad" not in result.stdout


def test_data_show_shows_the_good_rows_when_others_are_bad(tmp_path: Path, base: tuple[str, str]) -> None:
    """How many can't be read stands below, with the command that tells why; in JSON, beside it."""
    source = _write(tmp_path / "d.csv", "frage;antwort\nx;\n" + CSV.removeprefix("frage;antwort\n") + "s;\n")

    result = _run(tmp_path, "show", source, *base, *MAPPED, "--rows", "1")

    assert 0 == result.exit_code
    assert result.stdout.startswith("line 3: ")
    assert "⟦a<|im_end|>⟧" in result.stdout
    told = result.stderr.splitlines()[-1]
    command = f"hotswap data check {source} --map user=frage,assistant=antwort"
    assert f"rows that can't be read: 2; what is wrong with them: {command}" == told
    assert "errors: 1, " in _run(tmp_path, *command.split()[2:], *base).stdout
    assert 2 == len(json.loads(_run(tmp_path, "show", source, *base, *MAPPED, "--json").stdout))


def test_data_show_is_refused_when_every_row_is_bad(tmp_path: Path, base: tuple[str, str]) -> None:
    """There is nothing to show."""
    source = str(write_rows(tmp_path / "d.jsonl", [make_messages("q")]))

    with pytest.raises(DataError, match="expected user and assistant in turn"):
        _run(tmp_path, "show", source, *base)


def test_data_check_says_why_it_estimates_no_time_when_a_method_was_never_measured(
    tmp_path: Path, base: tuple[str, str]
) -> None:
    """Its own steps, and not those of supervised training; of sft both figures are ranges."""
    rows = str(write_rows(tmp_path / "rows.jsonl", [make_messages(f"q{number}", "a") for number in range(9)]))
    sampling = ("--method", "rloo", "--reward", "tone@v1", "--generations", "4", "--max-answer-tokens", "8")
    told = _run(tmp_path, "check", rows, *base, *sampling).stdout
    assert "12 steps; time and memory are not estimated: most of a step is spent on writing answers" in told
    told = _run(tmp_path, "check", rows, *base).stdout
    assert re.search(r"idle: 6 steps in .* s to .* s, [0-9.]+ .B to [0-9.]+ .B of memory", told)


def test_data_check_estimates_without_rows_that_it_refuses(tmp_path: Path, base: tuple[str, str]) -> None:
    """A few long rows that a run never sees must not ask for a larger machine; that they are left aside is said."""
    good = [make_messages(f"q{number}", "a") for number in range(4)]
    kept = str(write_rows(tmp_path / "kept.jsonl", good))
    mixed = str(write_rows(tmp_path / "mixed.jsonl", [*good, make_messages("q", "a" * 900)]))
    settings = (*base, "--max-length", "200")

    documents = [json.loads(_run(tmp_path, "check", source, *settings, "--json").stdout) for source in (kept, mixed)]

    kept_estimate, mixed_estimate = (document["estimate"] for document in documents)
    for figure in ("num_steps", "memory_bytes"):
        assert kept_estimate[figure] == mixed_estimate[figure]
    told = _run(tmp_path, "check", mixed, *settings).stdout
    assert "figures without rows that a run refuses (1):" in told


def test_data_convert_drops_the_row_of_one_file_when_another_has_the_same_line(
    tmp_path: Path, base: tuple[str, str]
) -> None:
    """A folder's rows are told apart by file and line: the good row on line 2 of the other file stays."""
    folder, out = tmp_path / "folder", tmp_path / "out.jsonl"
    write_rows(folder / "a.jsonl", [make_messages("p", "a"), make_messages("q", "a" * 300)])
    write_rows(folder / "b.jsonl", [make_messages("r", "b"), make_messages("s", "b")])

    result = _run(tmp_path, "convert", str(folder), str(out), "--drop-bad", *base, "--max-length", "200")

    kept = [json.loads(line)["messages"][0]["content"] for line in out.read_text().splitlines()]
    assert ["p", "r", "s"] == kept
    assert f"left out: {folder}/a.jsonl:2: " in result.stderr
    assert "rows left out: 1, kept: 3" in result.stderr


def test_data_convert_drops_the_long_row_alone_when_a_list_is_on_one_line(
    tmp_path: Path, base: tuple[str, str]
) -> None:
    """Rows of such a file have numbers, as all of them begin on line 1."""
    rows = [{"messages": make_messages("q", answer)} for answer in ("a", "a" * 300, "b")]
    source, out = _write(tmp_path / "d.json", json.dumps(rows)), tmp_path / "out.jsonl"

    result = _run(tmp_path, "convert", source, str(out), "--drop-bad", *base, "--max-length", "200")

    assert f"left out: {source}: row 2: " in result.stderr
    assert 2 == len(out.read_text().splitlines())
    assert _run(tmp_path, "show", source, *base).stdout.startswith("row 1: ")
    assert [1, 2, 3] == [found["row"] for found in json.loads(_run(tmp_path, "show", source, *base, "--json").stdout)]


def test_data_convert_drops_duplicates_when_rows_equal_an_earlier_one(tmp_path: Path) -> None:
    """The first of equal rows stays; one that differs in a weight alone is another row."""
    weighted = make_messages("q", "a", "r", "b")
    unweighted = [*weighted[:1], {**weighted[1], "weight": 0}, *weighted[2:]]
    source = str(write_rows(tmp_path / "d.jsonl", [weighted, unweighted, weighted, make_messages("s", "c"), weighted]))
    out = tmp_path / "out.jsonl"

    result = _run(tmp_path, "convert", source, str(out), "--drop-duplicates")

    assert [weighted, unweighted, make_messages("s", "c")] == [
        json.loads(line)["messages"] for line in out.read_text().splitlines()
    ]
    assert f"left out: {source}: lines 3, 5: equal an earlier row\nduplicates left out: 2, kept: 3\n" in result.stderr
    assert "duplicates" not in _run(tmp_path, "convert", str(out), str(tmp_path / "x"), "--drop-duplicates").stderr


def test_data_convert_refuses_a_file_before_it_reads_when_it_exists(tmp_path: Path) -> None:
    """Nobody waits minutes for an error that was plain at once: the source here would be an error, too."""
    out = tmp_path / "out.jsonl"
    out.write_text("mine")

    with pytest.raises(ConflictError, match="exists already; --force writes over it"):
        _run(tmp_path, "convert", str(tmp_path / "nowhere.csv"), str(out))
    with pytest.raises(DataError, match="can't be written: is a folder"):
        _run(tmp_path, "convert", str(tmp_path / "nowhere.csv"), str(tmp_path), "--force")


def test_data_check_divides_the_rows_when_a_share_is_held_out(tmp_path: Path, base: tuple[str, str]) -> None:
    """Both halves are checked, as a run would; the command against bad rows names the one source that there is."""
    rows = [make_messages(f"q{number}", f"a{number}") for number in range(40)]
    source = str(
        write_rows(tmp_path / "d.jsonl", [*rows, *[make_messages("q", "a" * number) for number in (300, 301)]])
    )

    result = _run(tmp_path, "check", source, *base, "--max-length", "200", "--validation-share", "0.5")

    assert 1 == result.exit_code
    document = json.loads(_run(tmp_path, "check", source, *base, "--validation-share", "0.5", "--json").stdout)
    train, validation = (document["report"][part] for part in ("train", "validation"))
    assert 42 == train["num_rows"] + validation["num_rows"]
    assert validation["num_rows"] > 0
    assert f"{source}: {validation['num_rows']} of 42 rows are held out for validation\n" in result.stderr
    assert f"{source} (held out): {validation['num_rows']} chat rows" in result.stdout
    assert f"hotswap data convert {source} OUT.jsonl --drop-bad --max-length 200" in result.stdout
    assert "convert" not in result.stdout.replace(f"hotswap data convert {source} OUT", "")


def test_data_check_refuses_a_share_when_there_is_validation_data(tmp_path: Path, base: tuple[str, str]) -> None:
    """As a run does."""
    source = str(write_rows(tmp_path / "d.jsonl", [make_messages("q", "a")] * 3))

    with pytest.raises(ConfigurationError, match="is given to validate with: give one of both"):
        _run(tmp_path, "check", source, *base, "--validation", source, "--validation-share", "0.5")


def test_data_check_wraps_no_line_when_the_terminal_is_narrow(
    tmp_path: Path, base: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be copied or searched for is on one line; and rows of one size need no histogram."""
    monkeypatch.setattr("clients.cli.output.console._width", 30)
    source = str(write_rows(tmp_path / "d.jsonl", [*[make_messages("q", "a")] * 3, make_messages("q", "a" * 300)]))

    told = _run(tmp_path, "check", source, *base, "--max-length", "200").stdout

    for line in (
        "Mend the rows as the errors say, give a higher --max-length where they are too long, or leave them out:",
        f"  hotswap data convert {source} OUT.jsonl --drop-bad --max-length 200",
        "  figures without rows that a run refuses (1):",
    ):
        assert line in told.splitlines()
    assert " tokens a row: 22 to 22; " in told
    assert "█" not in told


def test_commands_take_join_turns_when_turns_are_out_of_order(tmp_path: Path, base: tuple[str, str]) -> None:
    """Wherever --map is, and in a run's file; what check advises is run with it."""
    turns = [{"role": "assistant", "content": "w"}, *make_messages("q"), *make_messages("r", "a", "t")]
    rows = [turns, make_messages("q", "a" * 300)]
    source, out = str(write_rows(tmp_path / "d.jsonl", rows)), tmp_path / "out.jsonl"
    joined, length = (*base, "--join-turns"), ("--max-length", "200")

    assert "--join-turns does" in _run(tmp_path, "check", source, *base, *length).stdout
    checked = _run(tmp_path, "check", source, *joined, *length).stdout
    assert f"hotswap data convert {source} OUT.jsonl --drop-bad --join-turns --max-length 200" in checked
    assert "user\nq\n\nr" in _run(tmp_path, "show", source, *joined, "--rows", "1").stdout
    _run(tmp_path, "convert", source, str(out), *joined, *length, "--drop-bad")
    assert {"messages": make_messages("q\n\nr", "a")} == json.loads(out.read_text())
    write_rows(tmp_path / "d.jsonl", [turns] * 3)
    config = _write(tmp_path / "run.yaml", f"alias: t\ndata: {source}\njoin_turns: true\n")
    environment = {"HOTSWAP_HOME": str(tmp_path / "home"), "HOTSWAP_QUANTISATION": "none"}
    trained = CliRunner().invoke(
        app, ["train", "--config", config, *base, "--max-steps", "1", "--json"], env=environment
    )
    assert 3 == json.loads(trained.stdout)["num_rows"], trained.output


def test_train_refuses_a_name_before_it_reads_when_it_can_be_no_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data here would be an error, too; a name like it that would do is said."""
    arguments = ["hotswap", "train", "My Tickets", "--home", str(tmp_path), "--data", str(tmp_path / "nowhere.csv")]
    monkeypatch.setattr("sys.argv", arguments)

    with pytest.raises(SystemExit):
        main()

    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error: 'My Tickets' is not an alias: ")
    assert "my-tickets would do" == told[1]

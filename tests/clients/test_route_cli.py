"""`hotswap route` in process, on a home folder with a tiny base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.database import open_database
from adapters.errors import ConflictError, DataError, InvalidInputError
from adapters.registry import Registry
from adapters.store import ArtifactStore
from tests.clients.test_cli import Shell
from tests.support.routing import ABOUT_BREAD, ABOUT_LEASE, ABOUT_NOTHING, COOKING, LEGAL, PROMPTS
from tests.support.versions import publish_text


@pytest.fixture
def shell(tmp_path: Path, tiny_folders: dict[str, Path]) -> Shell:
    """A home where two aliases point to versions with prompts."""
    home = tmp_path / "home"
    home.mkdir()
    registry = Registry(open_database(f"sqlite:///{home / 'hotswap.db'}"), ArtifactStore(home / "store"))
    publish_text(registry, "one", alias="legal", prompts=LEGAL)
    publish_text(registry, "two", alias="cooking", prompts=COOKING)
    publish_text(registry, "three", alias="music")
    registry.database.close()
    return Shell(home, tiny_folders["llama"])


def _write(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_text_is_explained_when_no_command_is_named(shell: Shell) -> None:
    """The alias, all probabilities, the nearest prompts; for people and for programs."""
    shown = shell.text("route", LEGAL[0])
    assert shown.startswith("legal  (by the router: ")
    assert LEGAL[0] in shown
    assert "none of them" in shown
    document = shell.json("route", "explain", LEGAL[0])
    assert ("legal", "router") == (document["decision"]["alias"], document["decision"]["route"])
    assert LEGAL[0] == document["nearest"][0]["text"]
    assert "base" == shell.json("route", "what is the capital of france")["decision"]["alias"]


def test_rules_are_replaced_and_shown_when_given(shell: Shell, tmp_path: Path) -> None:
    """They decide at once; a wrong file changes nothing."""
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n- {name: kitchen, metadata: {team: kitchen}, alias: cooking}\n")
    assert "metadata team=kitchen" in shell.text("route", "rules", str(file))
    decision = shell.json("route", ABOUT_LEASE, "--metadata", "team=kitchen")["decision"]
    assert ("cooking", "kitchen") == (decision["alias"], decision["rule"])
    file.write_text("rules: [{alias: kitchn, matches: a}, {alias: cooking, matches: b}, {alias: base, matches: c}]")
    shown = shell.text("route", "rules", str(file))
    assert "no alias is called 'kitchn'" in shown
    assert "no alias is called 'base'" not in shown
    file.write_text("rules: [{alias: legal, match: a}]")
    with pytest.raises(
        InvalidInputError, match="rule 1: match: no such field, expected name, alias, metadata, key, matches"
    ):
        shell.text("route", "rules", str(file))
    file.write_text("rules:\n- {name: kitchen, metadata: {team: kitchen}, alias: cooking}\n")
    shell.text("route", "rules", str(file))
    file.write_text("rules: [{alias: legal}]")
    with pytest.raises(InvalidInputError, match="rule 1"):
        shell.text("route", "rules", str(file))
    assert ["kitchen"] == [rule["name"] for rule in shell.json("route", "rules")["rules"]]
    with pytest.raises(InvalidInputError, match="KEY=VALUE"):
        shell.text("route", ABOUT_LEASE, "--metadata", "team")


def test_version_without_prompts_is_found_when_it_is_given_some(shell: Shell, tmp_path: Path) -> None:
    """Each training makes a router; the one before can be gone back to."""
    shell.json("route", ABOUT_LEASE)
    with pytest.raises(ConflictError, match="no earlier router"):
        shell.text("route", "rollback")
    file = _write(tmp_path / "prompts.jsonl", *({"text": prompt} for prompt in PROMPTS["music"]))
    assert {"name": "music", "num_prompts": 8} == shell.json("route", "learn", "music", file)
    assert "music" == shell.json("route", "which chords for this guitar melody")["decision"]["alias"]
    history = shell.json("route", "history")
    assert [(2, {"cooking", "legal", "music"}), (1, {"cooking", "legal"})] == [
        (router["number"], set(router["versions"])) for router in history
    ]
    assert {"router": 1} == shell.json("route", "rollback")
    assert "1 *" in shell.text("route", "history")
    assert {"name": "music", "num_prompts": 0} == shell.json("route", "forget", "music")
    assert "base" == shell.json("route", "which chords for this guitar melody")["decision"]["alias"]
    assert {1: True, 2: False} == {
        router["number"]: router["can_be_restored"]
        for router in shell.json("route", "history")
        if router["number"] in (1, 2)
    }
    assert "deleted" in shell.text("route", "history")
    with pytest.raises(DataError, match=r"prompts\.jsonl:1"):
        shell.text("route", "learn", "music", _write(tmp_path / "prompts.jsonl", ["no row"]))


def test_promotion_says_so_when_the_version_has_no_prompts(shell: Shell, tmp_path: Path) -> None:
    """`auto` no longer knows the alias then; nothing is said where it does, and forgetting warns alike."""
    registry = Registry(
        open_database(f"sqlite:///{tmp_path / 'home' / 'hotswap.db'}"), ArtifactStore(tmp_path / "home" / "store")
    )
    publish_text(registry, "four", alias="legal", promote=False)
    registry.database.close()
    assert "only a rule of auto chooses legal now" in shell.text("adapters", "promote", "legal@v2")
    assert "only a rule" not in shell.text("adapters", "promote", "legal@v1")
    assert "may go to another alias" in shell.text("route", "forget", "legal")


@pytest.mark.parametrize(
    "command", [("learn", "music", "MISSING"), ("evaluate", "MISSING"), ("evaluate", "FILE", "--train", "MISSING")]
)
def test_file_is_named_when_it_is_not_there(shell: Shell, tmp_path: Path, command: tuple[str, ...]) -> None:
    """An error in a sentence, and no traceback."""
    paths = {
        "FILE": _write(tmp_path / "eval.jsonl", {"text": ABOUT_LEASE, "alias": "legal"}),
        "MISSING": "absent.jsonl",
    }
    with pytest.raises(InvalidInputError, match=r"^absent\.jsonl can't be read: No such file"):
        shell.text("route", *(paths.get(word, word) for word in command))


def test_router_is_measured_when_texts_are_labelled(shell: Shell, tmp_path: Path) -> None:
    """The present router, or one made from a file for it, which leaves no trace."""
    rows: list[dict[str, str | None]] = [
        {"text": ABOUT_LEASE, "alias": "legal", "paraphrase": "no notice for the tenant of this lease"},
        {"text": ABOUT_BREAD, "alias": "cooking"},
        {"text": ABOUT_NOTHING, "alias": None},
    ]
    file = _write(tmp_path / "eval.jsonl", *rows)
    train = _write(
        tmp_path / "train.jsonl",
        *({"text": text, "alias": alias} for alias, texts in PROMPTS.items() for text in texts),
    )
    alone = shell.json("route", "evaluate", file, "--train", train)
    assert (3, 1, 1.0, 1.0) == tuple(alone[name] for name in ("num_texts", "num_outside", "accuracy", "auc"))
    assert [] == shell.json("route", "history")
    shown = shell.text("route", "evaluate", file)
    assert "in/out AUC" in shown
    assert "A lower route_threshold" in shown
    assert [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8] == [point["threshold"] for point in alone["thresholds"]]
    with pytest.raises(InvalidInputError, match="no text with an alias that the router knows: cooking, legal"):
        shell.text("route", "evaluate", _write(tmp_path / "eval.jsonl", {"text": "a", "alias": "absent"}))

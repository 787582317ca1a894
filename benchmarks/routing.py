"""How well and how fast the router routes: unseen prompts of six domains, prompts of none, other wordings, other forms.

    python -m benchmarks.routing [--data DIR] [--debian] [--home HOME]

Trains from examples/routing.train.jsonl (150 prompts a domain) and measures on examples/routing.eval.jsonl, both
written for this project; settings were chosen on the first, and the second was looked at twice. DIR, if given, holds
{legal,medical,support}.{train,valid}.jsonl, chat rows: real prompts, the first 150 of each for training. `--debian`
adds one-line descriptions of Debian's packages, whose section is to be found: public texts that nobody wrote for a
router. It asks `apt-cache`, after `apt-get update`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters.base_files import pull_base
from adapters.routing.embeddings import TokenEmbeddings, open_embeddings
from adapters.routing.evaluation import Evaluation, evaluate, predictor_of
from adapters.routing.model import RouterModel
from adapters.routing.prompts import group_labelled, read_background, read_labelled
from adapters.routing.training import train_router
from adapters.settings import CoreSettings, resolve_home
from benchmarks.conditions import describe_machine, format_conditions

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_THRESHOLD = 0.5
_NUM_PROMPTS = 150
_NUM_TIMED = 2000
_REAL_DOMAINS = ("legal", "medical", "support")
_SECTIONS = ("games", "sound", "fonts", "mail", "database", "science")
_OTHER_SECTIONS = ("video", "admin")
_COLUMNS = (
    "accuracy",
    "macro F1",
    "in/out AUC",
    "ECE",
    "routed",
    "to a wrong one",
    "of none, routed",
    "flips: typos",
    "paraphrase",
)

Labelled = list[dict[str, Any]]


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of real chat rows")
    parser.add_argument("--debian", action="store_true", help="measure on descriptions of Debian's packages, too")
    parser.add_argument("--home", type=Path, help="home folder with the base model")
    arguments = parser.parse_args()
    core = CoreSettings.load(resolve_home(arguments.home))
    embeddings = open_embeddings(pull_base(core.base, core.home))
    print(format_conditions(describe_machine(core)))
    prompts = group_labelled(read_labelled(_EXAMPLES / "routing.train.jsonl"))
    rows: Labelled = read_labelled(_EXAMPLES / "routing.eval.jsonl")
    started = time.process_time()
    model = train_router(prompts, read_background(), embeddings)
    print(
        f"\ntrained in {time.process_time() - started:.1f} s of processor time, {len(model.to_bytes()) / 1e6:.1f} MB\n"
    )
    _print_table(_variants(prompts, rows, model, embeddings))
    if arguments.data:
        print("\nreal prompts:\n")
        _print_table(_real(arguments.data, embeddings))
    if arguments.debian:
        print("\nsections of Debian's packages:\n")
        _print_table(_debian(embeddings))
    _print_times(model, [row["text"] for row in rows], embeddings)


def _variants(
    prompts: Mapping[str, Sequence[str]], rows: Labelled, model: RouterModel, embeddings: TokenEmbeddings | None
) -> dict[str, Evaluation]:
    general = read_background()
    four = {alias: prompts[alias] for alias in list(prompts)[:4]}
    half = {alias: texts[::2] for alias, texts in prompts.items()}
    four_rows = [row for row in rows if row["alias"] is None or row["alias"] in four]
    framed = {alias: [_frame(alias, text) for text in texts] for alias, texts in prompts.items()}
    names = list(prompts)
    swapped = [
        {"text": _frame(names[(number + 1 + number // 7) % len(names)], row["text"]), "alias": row["alias"]}
        for number, row in enumerate(rows)
    ]
    return {
        "six domains": _measure(model, rows, embeddings),
        "75 prompts a domain": _measure(train_router(half, general, embeddings), rows, embeddings),
        "without embeddings": _measure(train_router(prompts, general), rows, None),
        "without general texts": _measure(train_router(prompts, [], embeddings), rows, embeddings),
        "four domains": _measure(train_router(four, general, embeddings), four_rows, embeddings),
        "forms swapped": _measure(train_router(framed, general, embeddings), swapped, embeddings),
    }


def _frame(alias: str, text: str) -> str:
    """A prompt in the form that data of one domain might have throughout."""
    return f"You are asked by a {alias} customer. Question: {text}\nGive the {alias} category only."


def _real(folder: Path, embeddings: TokenEmbeddings | None) -> dict[str, Evaluation]:
    prompts = {name: _asked(folder / f"{name}.train.jsonl")[:_NUM_PROMPTS] for name in _REAL_DOMAINS}
    outside = [row for row in read_labelled(_EXAMPLES / "routing.eval.jsonl") if row["alias"] is None]
    inside: Labelled = [
        {"text": text, "alias": name} for name in _REAL_DOMAINS for text in _asked(folder / f"{name}.valid.jsonl")
    ]
    model = train_router(prompts, read_background(), embeddings)
    return {"three domains": _measure(model, [*inside, *outside], embeddings)}


def _debian(embeddings: TokenEmbeddings | None) -> dict[str, Evaluation]:
    """Three draws of 150 training and 150 other descriptions a section; 120 of two other sections belong nowhere."""
    found = _read_sections()
    results = {}
    for seed in range(3):
        chance = np.random.default_rng(seed)
        drawn = {name: [found[name][place] for place in chance.permutation(len(found[name]))] for name in sorted(found)}
        prompts = {name: drawn[name][:_NUM_PROMPTS] for name in _SECTIONS}
        rows: Labelled = [
            {"text": text, "alias": name} for name in _SECTIONS for text in drawn[name][_NUM_PROMPTS : 2 * _NUM_PROMPTS]
        ]
        rows += [{"text": text, "alias": None} for name in _OTHER_SECTIONS for text in drawn[name][:60]]
        model = train_router(prompts, read_background(), embeddings)
        results[f"six sections, draw {seed + 1}"] = _measure(model, rows, embeddings)
    return results


def _read_sections() -> dict[str, list[str]]:
    """The descriptions of each section, one a source package: those of one source are alike."""
    listing = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    sections: dict[str, dict[str, str]] = {name: {} for name in (*_SECTIONS, *_OTHER_SECTIONS)}
    for entry in listing.split("\n\n"):
        fields: dict[str, str] = dict(
            re.findall(r"^(Package|Source|Section|Description(?:-en)?): (.*)$", entry, re.MULTILINE)
        )
        section = fields.get("Section", "").rpartition("/")[2]
        text = fields.get("Description") or fields.get("Description-en")
        if text and section in sections:
            source = (fields.get("Source") or fields["Package"]).partition(" ")[0]
            sections[section].setdefault(source, text)
    return {name: sorted(set(texts.values())) for name, texts in sections.items()}


def _asked(path: Path) -> list[str]:
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [next(message["content"] for message in row if message["role"] == "user") for row in rows]


def _measure(model: RouterModel, rows: Labelled, embeddings: TokenEmbeddings | None) -> Evaluation:
    return evaluate(
        predictor_of(model, embeddings),
        model.aliases,
        [row["text"] for row in rows],
        [row["alias"] for row in rows],
        [row.get("paraphrase") for row in rows],
        threshold=_THRESHOLD,
    )


def _print_table(results: Mapping[str, Evaluation]) -> None:
    print(f"| | {' | '.join(_COLUMNS)} |")
    print("|---" * (len(_COLUMNS) + 1) + "|")
    for name, found in results.items():
        values = [
            f"{found.accuracy:.3f}",
            f"{found.macro_f1:.3f}",
            _figure(found.auc),
            f"{found.calibration_error:.3f}",
            _figure(found.routed),
            _figure(found.misrouted),
            _figure(found.taken_in),
            _figure(found.flips_by_typos),
            _figure(found.flips_by_paraphrase),
        ]
        print(f"| {name} | {' | '.join(values)} |")
    first = next(iter(results.values()))
    points = ", ".join(f"{point.coverage:.0%}: {point.risk:.3f}" for point in first.risk_coverage)
    print(f"\nwrong among the most confident ({next(iter(results))}): {points}")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print_times(model: RouterModel, texts: Sequence[str], embeddings: TokenEmbeddings | None) -> None:
    """One text at a time, and conversations of six turns; processor time leaves out waiting for a core."""
    for name, size in (("one text", 1), ("six turns", 6)):
        walls, processors = [], []
        for number in range(_NUM_TIMED):
            asked = [texts[(number + turn) % len(texts)] for turn in range(size)]
            wall, processor = time.perf_counter(), time.thread_time()
            model.score(asked, embeddings)
            walls.append(1000 * (time.perf_counter() - wall))
            processors.append(1000 * (time.thread_time() - processor))
        wall_p50, wall_p99 = np.percentile(walls, [50, 99])
        cpu_p50, cpu_p99 = np.percentile(processors, [50, 99])
        print(
            f"\n{name}: {cpu_p50:.2f} ms p50, {cpu_p99:.2f} ms p99 of processor time; "
            f"{wall_p50:.2f} ms p50, {wall_p99:.2f} ms p99 by the clock"
        )


if __name__ == "__main__":
    main()

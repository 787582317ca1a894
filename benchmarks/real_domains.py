"""Trains, serves and scores three domains on data of your own, everything after the training over HTTP.

    python -m benchmarks.real_domains --data DIR [--home HOME] [--rows 120] [--domains legal support] [--defaults]

Without --defaults it is a recipe of so many steps, for comparison with other trainers; with it, what `hotswap train`
does when it is told nothing.

DIR holds {legal,medical,support}.{train,valid}.jsonl, chat rows. Legal and support answers are short labels, scored by
exact match; medical answers are prose, scored by the training's validation loss and by the overlap of words (F1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clients.http import HotswapClient
from clients.load import LoadRequest, LoadResult, run_load
from clients.local_server import running_server

_RECIPE = ["--batch-size", "8", "--rank", "16", "--alpha", "32", "--learning-rate", "5e-4", "--warmup-steps", "5"]
_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "litserve")


@dataclass(frozen=True, slots=True)
class Domain:
    """What to train and how to score it."""

    name: str
    max_steps: int
    max_tokens: int
    metric: str
    score: Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result."""

    domain: Domain
    training: dict[str, Any]
    base_score: float
    adapter_score: float
    tokens_per_second: float


def exact_match(answer: str, expected: str) -> float:
    """1 if the answers are the same but for space around them."""
    return float(answer.strip() == expected.strip())


def word_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall over words, counted with repetition (as in SQuAD, arXiv 1606.05250)."""
    found, wanted = (Counter(text.lower().split()) for text in (answer, expected))
    shared = sum((found & wanted).values())
    return 2 * shared / max(1, found.total() + wanted.total())


DOMAINS = (
    Domain("legal", 80, 16, "exact match", exact_match),
    Domain("medical", 80, 96, "word F1", word_f1),
    Domain("support", 150, 16, "exact match", exact_match),
)


def main() -> None:
    """Run everything and print one table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--home", type=Path, default=Path.home() / ".hotswap-benchmark")
    parser.add_argument("--rows", type=int, default=120, help="first validation rows to score (default 120)")
    parser.add_argument("--domains", nargs="+", default=[domain.name for domain in DOMAINS])
    parser.add_argument("--defaults", action="store_true", help="train with the project's own defaults")
    parser.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HOTSWAP_HOME": str(options.home)}
    domains = [domain for domain in DOMAINS if domain.name in options.domains]
    recipes: dict[str, list[str]] = {domain.name: [] if options.defaults else _recipe(domain) for domain in domains}
    trainings = {domain.name: _train(domain, options.data, recipes[domain.name], environment) for domain in domains}
    with running_server(environment, options.home / "benchmark-server.log", "--log-level", "warning") as url:
        rows = [
            asyncio.run(_score(url, domain, trainings[domain.name], options.data, options.rows, options.concurrency))
            for domain in domains
        ]
    settings = "the defaults of hotswap train" if options.defaults else " ".join(_RECIPE)
    _print_table(rows, options.rows, settings)


def _recipe(domain: Domain) -> list[str]:
    return [*_RECIPE, "--max-steps", str(domain.max_steps)]


def _train(domain: Domain, data: Path, recipe: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    files = [
        "--data",
        str(data / f"{domain.name}.train.jsonl"),
        "--validation",
        str(data / f"{domain.name}.valid.jsonl"),
    ]
    command = [sys.executable, "-m", "clients.cli", "train", domain.name, *files, *recipe, "--json"]
    command += ["--promote", "always"]  # what is scored is this run, whatever the gate thinks of it
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    document: dict[str, Any] = json.loads(result.stdout)
    return document


async def _score(
    url: str, domain: Domain, training: dict[str, Any], data: Path, num_rows: int, concurrency: int
) -> Row:
    lines = (data / f"{domain.name}.valid.jsonl").read_text(encoding="utf-8").splitlines()[:num_rows]
    conversations = [json.loads(line)["messages"] for line in lines]
    scores, speeds = [], []
    async with HotswapClient(url) as client:
        for model in ("base", training["published"]["label"]):
            started = time.monotonic()
            options = {"temperature": 0, "max_tokens": domain.max_tokens}
            requests = [LoadRequest(model, messages[0]["content"], options) for messages in conversations]
            results = await run_load(client, requests, concurrency=concurrency)
            scores.append(_mean_score(domain, results, conversations))
            tokens = sum(result.answer.usage["completion_tokens"] for result in results)
            speeds.append(tokens / (time.monotonic() - started))
    return Row(domain, training, scores[0], scores[1], speeds[1])


def _mean_score(domain: Domain, results: Sequence[LoadResult], conversations: Sequence[list[dict[str, str]]]) -> float:
    failed = [result.error for result in results if result.error]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed, the first with: {failed[0]}")
    pairs = zip(results, conversations, strict=True)
    return sum(domain.score(result.answer.text, messages[-1]["content"]) for result, messages in pairs) / len(results)


def _print_table(rows: Sequence[Row], num_rows: int, settings: str) -> None:
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    print(f"{settings}; first {num_rows} rows scored\n")
    print("| domain | steps | training | tokens/s | validation loss before -> after | metric | base | adapter |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        t = row.training
        losses = f"{t['validation_loss_before']:.3f} -> {t['validation_loss_after']:.3f}"
        print(
            f"| {row.domain.name} | {t['num_steps']} | {t['train_seconds']:.0f} s | {t['tokens_per_second']:.0f} "
            f"| {losses} | {row.domain.metric} | {row.base_score:.2f} | {row.adapter_score:.2f} |"
        )


if __name__ == "__main__":
    main()

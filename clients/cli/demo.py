"""`hotswap demo`: the whole life of adapters in a few minutes, on the example data.

It does nothing that a user could not do: every step runs the command line or speaks HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.cli.options import BaseOption, DeviceOption, HomeOption, load_core
from clients.cli.output import console, format_loss, make_table

if TYPE_CHECKING:
    from clients.http import ChatAnswer
    from clients.load import LoadResult

__all__ = ["demo"]

_EXAMPLES_DIR = Path(__file__).resolve().parents[2] / "examples"
_DOMAINS = ("legal", "medical", "support")
_QUESTION = "I slipped at the gym, my knee is swollen, and now they refuse to cancel my membership. What should I do?"
# Four answers for the gate, and none on the way there: a CPU writes slowly.
_QUICK = ("--sample-prompts", "0", "--gate-samples", "4")
_FIRST = ("--epochs", "1", "--batch-size", "4", "--learning-rate", "1e-3", *_QUICK)
_SECOND = ("--epochs", "2", "--batch-size", "4", "--learning-rate", "1e-3", "--seed", "1", *_QUICK)
_SALT = "hotswap-demo"
_METRIC = "ends_with_ticket"
_TICKET_LINE = re.compile(r"\nTicket: [A-Z]+-P[123] \| Next update within \d+ \w+$")
_ANSWERS_BEFORE_SWAP = 8
_ANSWERS_AFTER_SWAP = 16
_NUM_USERS = 48
_CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class _Trained:
    label: str
    num_rows: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class _Swap:
    versions: dict[str, int]
    num_failed: int
    seconds_to_first: float
    tokens_per_second: float


def demo(
    fresh: Annotated[bool, typer.Option(help="Train again instead of using what is there.")] = False,
    steps: Annotated[int | None, typer.Option(help="Cut every training to so many steps, for a quick look.")] = None,
    examples: Annotated[Path, typer.Option(help="Folder with the example data.", show_default=False)] = _EXAMPLES_DIR,
    home: HomeOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
) -> None:
    """Train three adapters, serve them, swap one under load, run an A/B split, and show what happened."""
    core = load_core(home, base=base, device=device)
    environment = {"HOTSWAP_HOME": str(core.home), "HOTSWAP_BASE": core.base, "HOTSWAP_DEVICE": core.device}
    shell = _Shell(os.environ | environment)
    from clients.local_server import running_server

    # Ended from outside, the demo must stop its server as it does on Ctrl+C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    console.rule("1  The base model")
    pulled = shell.json("base", "pull")
    console.print(f"{pulled['name']} in {pulled['folder']}, fingerprint {pulled['fingerprint'][:12]}")
    manifests = _read_own_manifests(shell, examples)
    if fresh:
        manifests = {}
    console.rule("2  One adapter per domain")
    cut = () if steps is None else ("--max-steps", str(steps))
    fingerprint = pulled["fingerprint"]
    trained = [
        _train_once(shell, domain, examples, (*_FIRST, *cut), manifests, fingerprint=fingerprint, promote=True)
        for domain in _DOMAINS
    ]
    console.rule("3  A second version of support, published but not live")
    second = (*_SECOND, *cut)
    candidate = _train_once(shell, "support", examples, second, manifests, fingerprint=fingerprint, promote=False)
    stable = trained[-1]
    _stop_leftover_experiment(shell)
    shell.json("adapters", "promote", stable.label)
    console.rule("4  One server for all")
    log = core.home / "demo-server.log"
    with contextlib.ExitStack() as stack:
        with console.status("starting the server and loading the base model in 4 bits"):
            url = stack.enter_context(running_server(shell.environment, log, "--log-level", "warning"))
        console.print(f"listening on {url} (its log: {log})", soft_wrap=True)
        answers = asyncio.run(_ask_everybody(url))
        console.rule(f"5  Swap {stable.label} for {candidate.label} while {_CONCURRENCY} clients keep asking")
        prompts = _read_prompts(examples)
        swap = asyncio.run(_swap_under_load(shell, url, stable.label, candidate.label, prompts))
        console.rule(f"6  A/B test: {_NUM_USERS} users, half on {stable.label}, half on {candidate.label}")
        report = asyncio.run(_split_traffic(shell, url, stable.label, candidate.label, prompts))
    console.rule("Summary")
    _print_summary([*trained, candidate], answers, swap, report)
    console.print(f"Done in {time.monotonic() - started:.0f} s; the server is stopped. Next:")
    for line in _next_commands(core.home):
        console.print(f"  {line}", markup=False, soft_wrap=True)


class _Shell:
    """Runs `hotswap` commands with the demo's home folder."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def json(self, *arguments: str) -> Any:
        """Run a command with --json and return its document; its progress goes to the terminal.

        Raises:
            typer.Exit: the command failed; it has said why.
        """
        command = [sys.executable, "-m", "clients.cli", *arguments, "--json"]
        result = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            console.print(f"hotswap {' '.join(arguments)} failed with exit code {result.returncode}", style="red")
            raise typer.Exit(1)
        return json.loads(result.stdout)


def _train_once(
    shell: _Shell,
    alias: str,
    examples: Path,
    options: tuple[str, ...],
    manifests: dict[str, dict[str, Any]],
    *,
    fingerprint: str,
    promote: bool,
) -> _Trained:
    """Train, unless the alias has a version with this very data, base model and settings."""
    train_file, validation_file = (examples / f"{alias}.{part}.jsonl" for part in ("train", "valid"))
    found = _find_trained(manifests, alias, train_file, options, fingerprint)
    if found is not None:
        console.print(f"{found.label}: trained before on the same data, used as it is (--fresh trains again)")
        return found
    flags = ["--data", str(train_file), "--validation", str(validation_file), *options]
    result = shell.json("train", alias, *flags, "--promote", "gate" if promote else "never")
    if promote and not result["is_live"]:
        console.print(f"{result['gate']['reason']}. The demo promotes it all the same, to have something to show.")
        shell.json("adapters", "promote", result["published"]["label"])
    trained = _Trained(
        label=result["published"]["label"],
        num_rows=result["num_rows"],
        before=result["validation_loss_before"],
        after=result["validation_loss_after"],
    )
    console.print(
        f"{trained.label}: validation loss {trained.before:.3f} -> {trained.after:.3f} "
        f"in {result['train_seconds']:.0f} s, {result['num_steps']} steps, {result['tokens_per_second']:.0f} tokens/s"
    )
    return trained


def _find_trained(
    manifests: dict[str, dict[str, Any]], alias: str, train_file: Path, options: tuple[str, ...], fingerprint: str
) -> _Trained | None:
    given = {name.removeprefix("--").replace("-", "_"): float(value) for name, value in _pairs(options)}
    wanted = {"seed": 0, "max_steps": None, **given}
    data_hash = _hash(train_file)
    for label, manifest in reversed(manifests.items()):
        same_settings = all(manifest["settings"].get(name) == value for name, value in wanted.items())
        same_data = label.startswith(f"{alias}@") and manifest["data"]["train_sha256"] == data_hash
        if same_settings and same_data and manifest["base"]["fingerprint"] == fingerprint:
            before, after = (manifest["metrics"][f"validation_loss_{when}"] for when in ("before", "after"))
            return _Trained(label, manifest["data"]["num_train_rows"], before, after)
    return None


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pairs(options: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(options[::2], options[1::2], strict=True))


async def _ask_everybody(url: str) -> list[tuple[str, ChatAnswer]]:
    """The same question to the base model and to each adapter, all in one mixed batch."""
    from clients.http import HotswapClient

    console.print(f'[bold]"{_QUESTION}"[/bold]')
    async with HotswapClient(url) as client:
        messages = [{"role": "user", "content": _QUESTION}]
        names = ["base", *_DOMAINS]
        answers = await asyncio.gather(*[client.chat(name, messages, temperature=0, max_tokens=110) for name in names])
    for answer in answers:
        console.print(f"[bold cyan]{answer.version}[/bold cyan]: ", end="")
        console.print(answer.text, markup=False)
    return list(zip(names, answers, strict=True))


async def _swap_under_load(shell: _Shell, url: str, stable: str, candidate: str, questions: list[str]) -> _Swap:
    """Keep clients asking, promote in their midst, and count what answered what."""
    from clients.http import HotswapClient
    from clients.load import LoadRequest, send_one

    prompts = itertools.cycle(questions)
    results: list[LoadResult] = []
    promoted_at: float | None = None

    def count(version: str) -> int:
        return sum(result.answer.version == version for result in results)

    async def ask_until_swapped(client: HotswapClient) -> None:
        while promoted_at is None or count(candidate) < _ANSWERS_AFTER_SWAP:
            request = LoadRequest("support", next(prompts), {"temperature": 0, "max_tokens": 48})
            results.append(await send_one(client, request))
            if results[-1].error is not None:
                return

    async with HotswapClient(url) as client:
        asking = [asyncio.create_task(ask_until_swapped(client)) for _ in range(_CONCURRENCY)]
        with console.status("16 clients are asking; the promotion happens in their midst"):
            while len(results) < _ANSWERS_BEFORE_SWAP:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(shell.json, "adapters", "promote", candidate)
            promoted_at = time.monotonic()
            await asyncio.gather(*asking)
    swap = _summarise_swap(results, candidate, promoted_at)
    console.print(
        f"{len(results)} answers: "
        + ", ".join(f"{number} from {version}" for version, number in sorted(swap.versions.items()))
        + f"; {swap.num_failed} failed. Every request sent after the promotion got {candidate}, the first of them its "
        f"first token after {swap.seconds_to_first:.2f} s, loading included. {swap.tokens_per_second:.0f} tokens/s."
    )
    if swap.num_failed or set(swap.versions) != {stable, candidate}:
        console.print("the swap did not go as it should", style="red")
        raise typer.Exit(1)
    return swap


def _summarise_swap(results: list[LoadResult], candidate: str, promoted_at: float) -> _Swap:
    good = [result for result in results if result.error is None]
    later = sorted((result for result in good if result.started >= promoted_at), key=lambda result: result.started)
    if any(result.answer.version != candidate for result in later):
        console.print("a request that was sent after the promotion got the old version", style="red")
        raise typer.Exit(1)
    tokens = sum(result.answer.usage["completion_tokens"] for result in good)
    seconds = max(result.ended for result in results) - min(result.started for result in results)
    # From its sending on: when a client happens to ask next after the promotion says nothing about the swap.
    waits = [result.first_token - result.started for result in later if result.first_token is not None]
    return _Swap(
        versions=dict(Counter(result.answer.version for result in good)),
        num_failed=len(results) - len(good),
        seconds_to_first=waits[0] if waits else math.nan,
        tokens_per_second=tokens / seconds,
    )


async def _split_traffic(shell: _Shell, url: str, stable: str, candidate: str, questions: list[str]) -> dict[str, Any]:
    """Simulated users talk to `support`; whether an answer keeps to the house form is reported as feedback."""
    from rich.progress import Progress

    from clients.http import HotswapClient
    from clients.load import LoadRequest, run_load
    from clients.sdk import AsyncHotswap

    with tempfile.TemporaryDirectory() as folder:
        config = _write_experiment(Path(folder) / "experiment.yaml", stable, candidate)
        experiment = await asyncio.to_thread(shell.json, "experiments", "create", "--config", str(config))
    requests = [
        LoadRequest("support", prompt, {"user": f"user-{user}", "temperature": 0, "max_tokens": 80})
        for user, prompt in enumerate(itertools.islice(itertools.cycle(questions), _NUM_USERS))
    ]
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("users", total=len(requests))
            async with HotswapClient(url) as client, AsyncHotswap(url) as hotswap:

                async def judge(result: LoadResult) -> None:
                    progress.advance(task)
                    if result.error is None:
                        kept = bool(_TICKET_LINE.search(result.answer.text))
                        await hotswap.feedback(result.answer.id, _METRIC, kept)

                await run_load(client, requests, concurrency=_CONCURRENCY, on_result=judge)
    finally:
        await asyncio.to_thread(shell.json, "experiments", "stop", experiment["id"])
    subprocess.run(
        [sys.executable, "-m", "clients.cli", "experiments", "show", experiment["id"]],
        env=shell.environment,
        check=True,
    )
    report: dict[str, Any] = await asyncio.to_thread(shell.json, "experiments", "show", experiment["id"])
    return report


def _write_experiment(path: Path, stable: str, candidate: str) -> Path:
    """An experiment with a primary metric and a guardrail, as a file; JSON is YAML, too."""
    arms = [{"name": name, "version": version, "weight": 50} for name, version in (("A", stable), ("B", candidate))]
    experiment = {
        "alias": "support",
        "arms": arms,
        "salt": _SALT,
        "metric": {"name": _METRIC},
        "guardrails": [{"metric": "error_rate", "margin": 0.25}],
        "planned_units": _NUM_USERS,
    }
    path.write_text(json.dumps(experiment), encoding="utf-8")
    return path


def _read_own_manifests(shell: _Shell, examples: Path) -> dict[str, dict[str, Any]]:
    """The manifests of the demo's earlier versions by label.

    The demo moves the names of its domains, so it must not find them in somebody's use.

    Raises:
        typer.Exit: a domain's alias has a version that was not trained on the example data.
    """
    own_data = {_hash(examples / f"{domain}.train.jsonl") for domain in _DOMAINS}
    manifests = {}
    for alias in shell.json("adapters", "list"):
        if alias["name"] not in _DOMAINS:
            continue
        for version in shell.json("adapters", "show", alias["name"])["versions"]:
            manifest = shell.json("adapters", "show", version["label"])["manifest"]
            if manifest["data"] is None or manifest["data"]["train_sha256"] not in own_data:
                console.print(
                    f"{version['label']} in this home was not made by the demo, which would move {alias['name']}; "
                    "give another --home",
                    style="red",
                )
                raise typer.Exit(1)
            manifests[version["label"]] = manifest
    return manifests


def _stop_leftover_experiment(shell: _Shell) -> None:
    """End the experiment that a demo left running when it was interrupted; anybody else's is left alone."""
    for alias in shell.json("adapters", "list"):
        if alias["name"] == "support" and alias["experiment_id"]:
            report = shell.json("experiments", "show", alias["experiment_id"])
            if report["experiment"]["salt"] == _SALT:
                shell.json("experiments", "stop", alias["experiment_id"])


def _read_prompts(examples: Path) -> list[str]:
    content = (examples / "support.valid.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"][0]["content"] for line in content.split("\n") if line]


def _print_summary(
    trained: list[_Trained], answers: list[tuple[str, ChatAnswer]], swap: _Swap, report: dict[str, Any]
) -> None:
    rows = [(t.label, t.num_rows, format_loss(t.before), format_loss(t.after)) for t in trained]
    console.print(make_table(["trained", "rows", "loss before", "loss after"], rows))
    short = [(name, answer.version, _shorten(answer.text)) for name, answer in answers]
    console.print(make_table(["asked", "answered by", "answer, shortened"], short))
    versions = ", ".join(f"{number} x {version}" for version, number in sorted(swap.versions.items()))
    arms = ", ".join(_describe_arm(arm) for arm in report["arms"])
    facts = [
        ("hot swap under load", f"{versions}, {swap.num_failed} failed"),
        (f"speed, {_CONCURRENCY} at a time", f"{swap.tokens_per_second:.0f} tokens/s"),
        ("A/B split", arms),
        ("trained validation loss", f"median {statistics.median(t.after for t in trained):.3f} nats a token"),
    ]
    console.print(make_table(["what", "measured"], facts))


def _describe_arm(arm: dict[str, Any]) -> str:
    found = [metric for metric in arm["metrics"] if metric["metric"] == _METRIC]
    shares = [f"{metric['mean']:.0%} end with a ticket" for metric in found]
    return (
        f"{arm['arm']['name']} (v{arm['arm']['number']}): {arm['num_units']} users, {''.join(shares) or 'no outcomes'}"
    )


def _shorten(text: str, side: int = 56) -> str:
    """Beginning and end: a domain shows at either."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 2 * side else f"{flat[:side]} ... {flat[-side:]}"


def _next_commands(home: Path) -> list[str]:
    custom = "" if home == Path("~/.hotswap").expanduser() else f" --home {home}"
    return [
        f"hotswap serve{custom}",
        'hotswap chat legal "Can my landlord raise the rent before the lease ends?"',
        f"hotswap adapters list{custom}",
        f"hotswap adapters rollback support{custom}",
        f"hotswap train mydomain --data my.jsonl{custom}",
        "(hotswap is in .venv/bin; or run: source .venv/bin/activate)",
    ]

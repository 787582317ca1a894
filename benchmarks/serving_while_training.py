"""What a running stream feels of a training job on the same machine: times between tokens, with and without one.

    python -m benchmarks.serving_while_training [--shares 1 0.25 0] [--streams 6] [--tokens 48] [--home HOME]

For each `job_share` a server is started and measured idle, then with a job that has begun its steps; one stream at a
time. The job trains on examples/support.train.jsonl with the server's defaults and is cancelled afterwards.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from clients.load import percentile
from clients.local_server import running_server

__all__ = ["Gaps", "main", "measure_streams", "running_job"]

_ROOT = Path(__file__).resolve().parents[1]
_DATA = _ROOT / "examples" / "support.train.jsonl"
_PROMPT = "Write a long letter to a friend about your work in the garden."
_JOB_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds between the tokens of all streams, sorted, and to the first of each."""

    between: list[float]
    to_first: list[float]

    def __str__(self) -> str:
        """In milliseconds; the mean beside the median, since tokens that come together hide what they waited for."""
        mean, median = statistics.mean(self.between), statistics.median(self.between)
        seconds = (mean, median, percentile(self.between, 0.95), statistics.median(self.to_first))
        shown = [f"{1000 * value:.0f} ms" for value in seconds]
        return f"between tokens mean {shown[0]}, p50 {shown[1]}, p95 {shown[2]}; to the first {shown[3]}"


def measure_streams(client: httpx.Client, *, num_streams: int, num_tokens: int) -> Gaps:
    """Stream answers of the base model, one after another."""
    between: list[float] = []
    to_first: list[float] = []
    for _ in range(num_streams):
        started = time.perf_counter()
        times = list(_token_times(client, num_tokens))
        to_first.append(times[0] - started)
        between += [later - earlier for earlier, later in pairwise(times)]
    return Gaps(sorted(between), sorted(to_first))


def _token_times(client: httpx.Client, num_tokens: int) -> Iterator[float]:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if '"content":' in line and '"content":""' not in line:
                yield time.perf_counter()


@contextmanager
def running_job(client: httpx.Client) -> Iterator[str]:
    """A job that has done a step and goes on until the block ends."""
    with _DATA.open("rb") as file:
        answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (_DATA.name, file)})
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50}}}
    body = {
        "model": "base",
        "training_file": answer.raise_for_status().json()["id"],
        "suffix": "bench",
        "method": method,
    }
    job: str = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    try:
        _wait_for_a_step(client, job)
        yield job
    finally:
        client.post(f"/v1/fine_tuning/jobs/{job}/cancel")


def _wait_for_a_step(client: httpx.Client, job: str) -> None:
    deadline = time.monotonic() + _JOB_TIMEOUT_S
    while _num_steps(client, job) == 0:
        status = client.get(f"/v1/fine_tuning/jobs/{job}").json()["status"]
        if status not in ("validating_files", "queued", "running") or time.monotonic() > deadline:
            raise SystemExit(f"the job did not begin: it is {status}")
        time.sleep(0.5)


def _num_steps(client: httpx.Client, job: str) -> int:
    events: list[dict[str, Any]] = client.get(f"/v1/fine_tuning/jobs/{job}/events?limit=100").json()["data"]
    return max((event["data"]["step"] for event in events if event["type"] == "metrics"), default=0)


def main() -> None:
    """Measure for each share and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25, 0.0])
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--home", type=Path, default=Path.home() / ".hotswap-benchmark")
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f}")
    for share in options.shares:
        _measure_share(share, options)


def _measure_share(share: float, options: argparse.Namespace) -> None:
    environment = os.environ | {"HOTSWAP_HOME": str(options.home), "HOTSWAP_SERVE_JOB_SHARE": str(share)}
    counts = {"num_streams": options.streams, "num_tokens": options.tokens}
    log = options.home / "serving-while-training.log"
    with (
        running_server(environment, log, "--log-level", "warning") as url,
        httpx.Client(base_url=url, timeout=_JOB_TIMEOUT_S) as client,
    ):
        measure_streams(client, num_streams=1, num_tokens=8)  # grows what a first answer grows
        alone = measure_streams(client, **counts)
        print(f"no job:                {alone}", flush=True)
        with running_job(client) as job:
            before, started = _num_steps(client, job), time.monotonic()
            beside = measure_streams(client, **counts)
            steps, seconds = _num_steps(client, job) - before, time.monotonic() - started
        ratios = [of(beside.between) / of(alone.between) for of in (statistics.mean, statistics.median)]
        print(f"job, job_share {share:<4g}:   {beside}; {steps} steps in {seconds:.0f} s", flush=True)
        print(f"                       mean {ratios[0]:.2f}x, p50 {ratios[1]:.2f}x", flush=True)


if __name__ == "__main__":
    main()

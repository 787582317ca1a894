"""The printed table: targets, order, formats; no measurement."""

from __future__ import annotations

import json

import pytest

from benchmarks.table import TARGETS, Row, Target, format_table, format_value, to_document


def _row(key: str, value: float) -> Row:
    return Row(key, f"what {key} is", value, "ms" if key == "cold" else "x", "detail", {"samples": [value]})


@pytest.mark.parametrize(
    ("target", "value", "expected"),
    [
        (Target(0.8, 0.92), 0.79, "no"),
        (Target(0.8, 0.92), 0.80, "reach"),
        (Target(0.8, 0.92), 0.92, "stretch"),
        (Target(2, 1.4, is_limit=True), 2.1, "no"),
        (Target(2, 1.4, is_limit=True), 2.0, "reach"),
        (Target(2, 1.4, is_limit=True), 1.4, "stretch"),
        (Target(3), 1e9, "reach"),
        (Target(3), float("nan"), "no"),
    ],
)
def test_target_tells_the_best_level_met_when_given_a_value(target: Target, value: float, expected: str) -> None:
    """At least or at most, both levels included; a figure that is no number meets nothing."""
    assert expected == target.met(value)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.846, "x", "0.85x"),
        (50, "ms", "50.0 ms"),
        (0.1234, "ms", "0.123 ms"),
        (1234.5, "ms", "1234 ms"),
        (0, "ms", "0 ms"),
        (None, "x", "-"),
    ],
)
def test_value_keeps_its_digits_when_formatted(value: float | None, unit: str, expected: str) -> None:
    """Ratios have two digits, times three significant ones."""
    assert expected == format_value(value, "x" if unit == "x" else "ms")


def test_table_follows_the_targets_order_when_rows_came_in_another() -> None:
    """A row that is not in the list comes last and has no target."""
    table = format_table([_row("unlisted", 1), _row("cold", 14), _row("mixed-8", 0.5)])
    assert table.splitlines() == [
        "| what | figure | reach | stretch | met |",
        "|---|---|---|---|---|",
        "| what mixed-8 is | 0.50x (detail) | 0.80x | 0.92x | no |",
        "| what cold is | 14.0 ms (detail) | 50.0 ms | 15.0 ms | stretch |",
        "| what unlisted is | 1.00x (detail) | - | - | - |",
    ]


def test_live_peer_has_the_recorded_peers_targets_when_it_is_the_same_peer() -> None:
    """A peer named vllm is held to vLLM's row; a stranger has no target."""
    assert TARGETS["vllm-8"] == _row("live-vllm-8", 1).target
    assert _row("live-other-8", 1).target is None


def test_document_holds_samples_and_conditions_when_written_as_json() -> None:
    """What the table rounds, the document keeps."""
    document = json.loads(json.dumps(to_document([_row("mixed-8", 0.81234)], {"cores": 2})))
    (row,) = document["rows"]
    assert {"cores": 2} == document["conditions"]
    assert ({"samples": [0.81234]}, "reach", 0.8) == (row["samples"], row["met"], row["target"]["reach"])

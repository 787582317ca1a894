"""Loss curves: what is drawn from which numbers."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from adapters.methods import ROW_KINDS, Method
from training.plots import CURVES_FILE, MEASURES, draw_braille, draw_svg, read_curves, write_curves
from training.run_log import RunLog

SVG = "{http://www.w3.org/2000/svg}"


def test_curves_hold_what_was_measured_when_lines_are_read() -> None:
    """A line may have either loss, both or none; what is null was no number."""
    lines: list[dict[str, float | None]] = [
        {"step": 1, "train_loss": 2.0},
        {"step": 2, "train_loss": None},
        {"step": 2, "valid_loss": 1.5},
        {"step": 3},
    ]
    assert read_curves(lines, "sft") == {"training": [(1.0, 2.0)], "validation": [(2.0, 1.5)]}
    assert read_curves([], "sft") == {}


def test_curves_hold_rewards_when_answers_are_sampled() -> None:
    """As a run writes them, and as a job's events hold them; the losses beside them are not drawn."""
    of_a_run = [
        {"kind": "step", "step": 1, "train_loss": 0.0, "mean_reward": 0.25},
        {"kind": "evaluation", "step": 1, "valid_loss": -0.5, "mean_reward": 0.5},
    ]
    of_a_job = [{"step": 1, "train_loss": 0.0, "train_mean_reward": 0.25, "valid_loss": -0.5, "valid_mean_reward": 0.5}]
    expected = {"training": [(1.0, 0.25)], "validation": [(1.0, 0.5)]}
    assert expected == read_curves(of_a_run, "rloo") == read_curves(of_a_job, "grpo")


@pytest.mark.parametrize("method", sorted(ROW_KINDS))
def test_svg_names_what_the_method_is_watched_by_when_it_is_written(tmp_path: Path, method: Method) -> None:
    """Nats a token are the unit of supervised training alone."""
    log = RunLog(tmp_path / "run")
    log.note("step", 1, {"train_loss": 1.0, "mean_reward": 0.5})
    write_curves(log, method)
    drawn = (tmp_path / "run" / CURVES_FILE).read_text()
    assert f"{MEASURES[method]} by step" in drawn
    assert ("nats" in drawn) == (method == "sft")
    assert 1 == drawn.count("<polyline")


def test_svg_has_a_line_a_curve_when_it_is_parsed(tmp_path: Path) -> None:
    """Well-formed, the highest loss at the top, and every curve named."""
    log = RunLog(tmp_path / "run")
    for step in range(1, 11):
        log.note("step", step, {"train_loss": 3.0 - step / 5})
    log.note("evaluation", 10, {"valid_loss": 1.25})
    write_curves(log, "sft")
    root = ET.parse(tmp_path / "run" / CURVES_FILE).getroot()
    lines = root.findall(f"{SVG}polyline")
    points = [[tuple(map(float, point.split(","))) for point in line.attrib["points"].split()] for line in lines]
    assert [len(line) for line in points] == [10, 1]
    assert points[0] == sorted(points[0])
    assert [y for _, y in points[0]] == sorted(y for _, y in points[0])  # down the page, as the loss falls
    texts = {text.text for text in root.findall(f"{SVG}text")}
    assert {"training", "validation", "2.8", "1", "10"} <= texts


def test_svg_is_drawn_when_there_is_little_or_much_to_draw() -> None:
    """Nothing, a flat line, and far more steps than it has columns, whose last is kept."""
    assert draw_svg({}, title="t").count("<polyline") == 0
    assert "nan" not in draw_svg({"a <b>": [(1.0, 2.0), (2.0, 2.0)]}, title="t")
    assert "a &lt;b&gt;" in draw_svg({"a <b>": [(1.0, 2.0)]}, title="t")
    many = draw_svg({"training": [(float(step), 1.0 / step) for step in range(1, 10_001)]}, title="t")
    assert len(many) < 100_000
    assert many.split('points="')[1].split('"')[0].split()[-1].startswith("664.0,")


def test_braille_falls_from_corner_to_corner_when_the_loss_does() -> None:
    """The first character has its highest dot, the last its lowest."""
    lines = draw_braille([(0.0, 4.0), (10.0, 1.0)], width=20, height=5)
    assert [len(line) for line in lines] == [20] * 5
    assert ord(lines[0][0]) & 0x01
    assert ord(lines[-1][-1]) & 0x80
    assert {line for line in lines if line.strip("\u2800")} == set(lines)


def test_braille_is_one_row_of_dots_when_the_loss_is_flat() -> None:
    """In the middle, not at an end."""
    lines = draw_braille([(1.0, 2.0), (2.0, 2.0)], width=8, height=3)
    assert [bool(line.strip("\u2800")) for line in lines] == [False, True, False]


def test_no_file_is_written_when_nothing_was_measured(tmp_path: Path) -> None:
    """A run that failed before its first step leaves no empty picture."""
    write_curves(RunLog(tmp_path), "sft")
    assert not (tmp_path / CURVES_FILE).exists()

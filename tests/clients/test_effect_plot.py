"""An effect over time: what is drawn from which numbers, in characters and as SVG."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from clients.cli.effect_plot import EffectPoint, draw_effect, draw_effects_svg

SVG = "{http://www.w3.org/2000/svg}"
# An interval that closes in on 0.4, and leaves zero behind at 64 users.
CLOSING = [EffectPoint(n, 0.4, 0.4 - 3 / n**0.5, 0.4 + 3 / n**0.5) for n in (4, 16, 64, 256, 400)]


def _cells(lines: list[str]) -> list[str]:
    return [line.split("│")[1] for line in lines if "│" in line]


def test_terminal_plot_shows_band_estimate_and_zero_when_drawn() -> None:
    """Every line is as wide as asked for; the estimate lies within the band, and the band narrows."""
    lines = draw_effect(CLOSING, width=40, height=11)
    cells = _cells(lines)
    assert ([40] * 11, 1) == (
        [len(row) for row in cells],
        sum(line.split("│")[0].strip() == "0" for line in lines[:11]),
    )
    heights = [sum(row[column] in "░●" for row in cells) for column in range(40)]
    assert heights[0] > heights[-1]
    assert all(sum(row[column] == "●" for row in cells) == 1 for column in range(40))
    assert ("4", "400 users") == (lines[-1].split()[0], " ".join(lines[-1].split()[1:]))


@pytest.mark.parametrize(("sign", "is_above"), [(1, True), (-1, False)])
def test_band_lies_on_the_side_of_zero_where_the_effect_is_when_it_is_shown(sign: int, is_above: bool) -> None:
    """At the end nothing of it touches the line."""
    points = [
        EffectPoint(point.num_units, sign * point.estimate, min(sign * point.low, sign * point.high),
                    max(sign * point.low, sign * point.high))
        for point in CLOSING
    ]  # fmt: skip
    lines = draw_effect(points, width=30, height=21)
    zero = next(row for row, line in enumerate(lines) if line.split("│")[0].strip() == "0")
    last = [row for row, line in enumerate(_cells(lines)) if line[-1] in "░●"]
    assert all((row < zero) == is_above for row in last)


def test_plot_is_there_when_there_is_one_point_or_no_width() -> None:
    """A single look, and an interval of no length."""
    assert 12 == len(_cells(draw_effect([EffectPoint(10, 0.0, 0.0, 0.0)])))
    assert "svg" in draw_effects_svg({"B": [EffectPoint(10, 0.0, 0.0, 0.0)]}, title="x")


def test_svg_has_a_band_and_a_line_for_each_arm_when_parsed() -> None:
    """Well-formed, whatever the title; bands of as many corners as there are ends; all within the frame."""
    root = ET.fromstring(draw_effects_svg({"B": CLOSING, "C": CLOSING[:3]}, title="a < b & c"))
    bands = [band.attrib["points"].split() for band in root.findall(f"{SVG}polygon")]
    lines = [line.attrib["points"].split() for line in root.findall(f"{SVG}polyline")]
    assert ([10, 6], [2, 5, 3]) == ([len(band) for band in bands], [len(line) for line in lines])
    places = [tuple(map(float, place.split(","))) for shape in (*bands, *lines) for place in shape]
    assert all(64 <= across <= 656 and 64 <= down <= 296 for across, down in places)
    texts = {text.text for text in root.findall(f"{SVG}text")}
    assert {"a < b & c", "B", "C", "0", "4 users", "400 users"} <= texts

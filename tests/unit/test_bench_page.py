"""The page of a run, and its figures, from rows that were made up."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from bench.drawing import draw
from bench.figures import Curves, Figure, Stack
from bench.page import page
from bench.rows import Pair

SVG = "{http://www.w3.org/2000/svg}"
CURVES = Curves(
    "Latency", "us", "%", {"kvmpy": [(1.0, 0.0), (10.0, 100.0)], "QEMU": [(2.0, 0.0), (1000.0, 50.0)]}, True
)
STACK = Stack("Start", "ms", {"kvmpy": {"imports": 90.0, "machine": 10.0}, "QEMU": {"machine": 50.0}})


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def points(svg: str) -> list[list[tuple[float, float]]]:
    """Of the lines that are no grid."""
    lines = [line for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline") if line.get("stroke-width") == "1.5"]
    found = []
    for line in lines:
        pairs = [pair.split(",") for pair in line.attrib["points"].split()]
        found.append([(float(x), float(y)) for x, y in pairs])
    return found


def test_a_curves_figure_names_its_lines_and_its_axes() -> None:
    said = texts(draw(CURVES))
    assert {"Latency", "▬ kvmpy", "▬ QEMU", "us; upward: %"} <= set(said)
    assert {"1", "2", "5", "10", "1000"} <= set(said)


def test_decades_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    ours, theirs = points(draw(CURVES))
    assert ours[1][0] - ours[0][0] == pytest.approx((theirs[1][0] - ours[0][0]) / 3, abs=0.2)
    assert ours[1][1] < theirs[1][1] < ours[0][1]


def test_a_bar_is_as_long_as_the_sum_of_its_parts() -> None:
    rects = [
        each for each in ElementTree.fromstring(draw(STACK)).iter(f"{SVG}rect") if each.find(f"{SVG}title") is not None
    ]
    widths = [float(each.attrib["width"]) for each in rects]
    assert widths[0] + widths[1] == pytest.approx(2 * widths[2], abs=0.1)
    assert {"■ imports", "■ machine", "kvmpy", "QEMU"} <= set(texts(draw(STACK)))


@pytest.mark.parametrize(
    "figure",
    [
        Curves("a", "s", "B", {}),
        Curves("a", "s", "B", {"kvmpy": []}),
        Curves("a", "s", "B", {"kvmpy": [(0.0, 0.0)]}),
        Curves("a", "s", "B", {"kvmpy": [(0.0, 0.0)]}, log_x=True),
        Stack("a", "ms", {}),
        Stack("a", "ms", {"kvmpy": {}}),
        Stack("a", "ms", {"kvmpy": {"x": 0.0}}),
    ],
)
def test_what_is_empty_is_drawn_all_the_same(figure: Figure) -> None:
    assert "a" in texts(draw(figure))


def test_the_page_has_facts_verdicts_and_figures_and_loads_nothing() -> None:
    rows = [
        Pair("exits: PIO <write>", [2.0], [1.0], budget="exit", figure=CURVES).row(),
        Pair("start", [1.0], [2.0], budget="start", figure=STACK).row(),
        Pair("memory", [math.nan], [2.0], "MiB", "memory", note="why & how").row(),
        Pair("other", [1.0], [2.0], peer_name="microvm").row(),
    ]
    html = page(rows, {"kernel": "Linux 6.1"})
    assert "4 ratios; of 3 that have a budget, 1 meet it." in html
    assert "<td>exits: PIO &lt;write&gt;</td><td>2 s</td><td>1 s</td><td>2.000</td>" in html
    assert "<td class='missed'>missed</td>" in html
    assert "<td>why &amp; how; nothing was measured</td>" in html
    assert "<td>beside microvm</td>" in html
    assert "Linux 6.1" in html
    assert html.count("<svg") == 2
    assert "src=" not in html
    assert "href=" not in html

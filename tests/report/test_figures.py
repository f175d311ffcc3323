"""The figures show the numbers they are given, for any number of experiences, without global state."""

import re
import subprocess
import sys
from html import unescape
from xml.etree import ElementTree

import pytest
import torch

from clplat.report import figures
from clplat.report.spread import spread
from clplat.scores import NAN, ScoreTable


def table(k: int = 3, between: int = 0, score: str = "accuracy", higher: bool = True) -> ScoreTable:
    scores = ScoreTable(k, score, higher)
    scores.append([0.1] * k, -1, 0)
    step = 0
    for i in range(k):
        for _ in range(between):
            step += 5
            scores.append([0.3 + 0.01 * j for j in range(k)], i, step, final=False)
        step += 5
        scores.append([0.9 - 0.1 * (i - j) if j <= i else 0.1 for j in range(k)], i, step)
    return scores


def drawn(figure):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()}


def spoken(page: str) -> dict[str, str]:
    """What the page says of each element that is pointed at."""
    return {
        identity: unescape(title) for identity, title in re.findall(r'<g id="([^"]+)"><title>([^<]*)</title>', page)
    }


def test_a_curve_begins_when_its_experience_was_trained():
    lines = drawn(figures.curves(table(), ["zero", "one", "two"]))
    assert lines["zero"] == ([1, 2, 3], pytest.approx([0.9, 0.8, 0.7]))
    assert lines["one"] == ([2, 3], pytest.approx([0.9, 0.8]))
    assert lines["two"] == ([3], pytest.approx([0.9]))
    assert lines["average so far"] == ([1, 2, 3], pytest.approx([0.9, 0.85, 0.8]))


def test_rows_in_between_lie_between():
    scores = table(2, between=3)
    assert figures.progress(scores).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])
    x, y = figures.curve(scores, 1)
    assert x == pytest.approx([1.25, 1.5, 1.75, 2])
    assert y == pytest.approx([0.31, 0.31, 0.31, 0.9])


def test_the_matrix_shows_every_number():
    scores = table()
    scores.rows[1, 2] = NAN
    axes = figures.matrix(scores).axes[0]
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert texts[(0, 2)] == "0.70"
    assert texts[(2, 1)] == "0.10"
    assert (2, 0) not in texts
    assert axes.get_xlabel() == "tested on"
    assert axes.get_ylabel() == "after training on"


@pytest.mark.parametrize(
    "scores", [table(1), table(25), table(2, 4), table(3, 0, "bits_per_token", False), ScoreTable(3)]
)
def test_any_run_can_be_drawn(scores, tmp_path):
    for name, draw in (("curves", figures.curves), ("matrix", figures.matrix)):
        path = tmp_path / f"{name}.png"
        draw(scores).savefig(path, dpi=60)
        assert path.stat().st_size > 2000
    curves = [name for name in spoken(figures.html(scores)) if name.startswith("curve-")]
    assert len(curves) == (scores.finished + 1 if scores.finished else 0)


def test_an_unfinished_run_is_drawn_as_far_as_it_went():
    scores = ScoreTable(3)
    scores.append([0.9, 0.1, 0.1], 0, 5)
    scores.append([0.5, 0.4, 0.1], 1, 8, final=False)
    x, y = figures.curve(scores, 0)
    assert (x[0], y) == (1, [0.9, 0.5])
    assert 1 < x[1] <= 2
    figures.curves(scores)


def test_the_page_needs_no_network_and_holds_the_numbers():
    page = figures.html(table(), ["zero", "one", "two"])
    assert not re.search(r"<script[^>]+src=", page)
    assert not re.search(r"<link[^>]+href=", page)
    said = spoken(page)
    assert said["curve-0"] == "zero: 0.900 0.800 0.700"
    assert said["curve-2"] == "two: 0.900"
    assert said["curve-average"] == "average so far: 0.900 0.850 0.800"
    assert said["cell-2-0"] == "after two, on zero: 0.7000"
    assert len([name for name in said if name.startswith("cell-")]) == 9
    ElementTree.fromstring(page.partition("<body>")[2].partition("</body>")[0].join(["<all>", "</all>"]))


@pytest.mark.parametrize("k", [20, 200])
def test_the_page_stays_small(k):
    draw = torch.Generator().manual_seed(0)
    scores = ScoreTable(k)
    for i in range(k):
        scores.append(torch.rand(k, generator=draw).tolist(), i, i)
    page = figures.html(scores, [f"a rather long & odd <name> {i}" for i in range(k)])
    assert len(page.encode()) < 300_000
    assert "<name>" not in page


def test_of_many_experiences_some_are_shown_evenly():
    assert spread(5, None) == spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(9, 3) == [0, 4, 8]
    assert spread(9, 1) == [0]
    assert spread(9, 0) == []
    for most in range(2, 12):
        chosen = spread(1000, most)
        assert (chosen[0], chosen[-1], len(chosen)) == (0, 999, most)


def test_names_are_shortened():
    assert figures.labels(2) == ["experience 0", "experience 1"]
    (short,) = figures.labels(1, ["a" * 40])
    assert len(short) == 24


def test_pyplot_is_not_touched():
    code = """
import sys
from clplat.report import figures
from clplat.report.spread import spread
from clplat.scores import ScoreTable
assert "matplotlib" not in sys.modules
figures.curves(ScoreTable(2)), figures.matrix(ScoreTable(2))
print("matplotlib.pyplot" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_scores_are_left_alone():
    scores = table()
    before = scores.rows.clone()
    for draw in (figures.curves, figures.matrix, figures.html):
        draw(scores)
    assert torch.equal(scores.rows, before)

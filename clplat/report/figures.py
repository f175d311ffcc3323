"""Figures of one run: forgetting curves, and R as a heat map.

They are pictures, or one page that needs no network. matplotlib is imported where it is used. Figures are
made without pyplot, so nothing global changes and nothing has to be closed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplat.metrics import after_each, average_accuracy
from clplat.report.spread import spread
from clplat.scores import ScoreTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, AVERAGE = "#222222", "#dddddd", "#111111"
DRAWN, POINTS, CELLS = 40, 200, 100
"""At most so many curves, points of a curve, and rows of R, evenly chosen: more cannot be told apart."""

PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; margin: 1em }} svg {{ max-width: 100%; height: auto }}
svg text {{ font-family: "DejaVu Sans", sans-serif }}
[id^=curve-]:hover path {{ stroke-width: 4 }} [id^=cell-]:hover {{ text-decoration: underline }}
</style></head><body>
{drawings}
</body></html>
"""


def labels(experiences: int, names: Sequence[str] | None = None) -> list[str]:
    """Labels of experiences: their names, shortened to 24 characters; their numbers if they have none."""
    if names is None:
        return [f"experience {i}" for i in range(experiences)]
    return [name if len(name) <= 24 else f"{name[:23]}…" for name in names]


def progress(table: ScoreTable) -> Tensor:
    """[rows] place of each row of the table on an axis of experiences seen.

    Rows inside experiences have fractions. 0 is the untrained learner, i + 1 the end of experience i.
    """
    ends = {i: step for i, step, final in zip(table.trained, table.step, table.final, strict=True) if final or i < 0}
    places = []
    for i, step, final in zip(table.trained, table.step, table.final, strict=True):
        begin = ends.get(i - 1, 0)
        whole = max(ends.get(i, max(table.step)) - begin, 1)
        places.append(float(i + 1) if final or i < 0 else i + (step - begin) / whole)
    return torch.tensor(places, dtype=torch.float64)


def curve(table: ScoreTable, experience: int) -> tuple[list[float], list[float]]:
    """Experiences seen and the score on one experience, from the moment it was first trained on."""
    begun = torch.tensor(table.trained) >= experience
    scores = table.rows[:, experience]
    chosen = begun & ~scores.isnan()
    return progress(table)[chosen].tolist(), scores[chosen].tolist()


def curves(table: ScoreTable, names: Sequence[str] | None = None) -> Figure:
    """The score on each experience from the moment it was trained, and their average in black."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    k, shown = table.experiences, labels(table.experiences, names)
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shades = colormaps["viridis"]([0.9 * j / max(k - 1, 1) for j in range(k)])
    dense = table.has_between or k > DRAWN
    look = {"linewidth": 1.2, "marker": ""} if dense else {"linewidth": 1.8, "marker": "o", "ms": 4}
    for j in spread(k, DRAWN):
        x, y = curve(table, j)
        some = spread(len(x), POINTS)
        axes.plot([x[i] for i in some], [y[i] for i in some], color=shades[j], label=shown[j], gid=f"curve-{j}", **look)
    x, look = list(range(1, table.finished + 1)), {"marker": "" if dense else "s", "ms": 5}
    axes.plot(
        x, _averages(table), color=AVERAGE, linewidth=2.6, label="average so far", zorder=5, gid="curve-average", **look
    )
    axes.set_xlabel("experiences learned")
    axes.set_ylabel(_words(table))
    axes.set_xticks(range(0 if table.has_between else 1, k + 1, max(1, k // 12)))
    if table.score == "accuracy":
        axes.set_ylim(-0.02, 1.04)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{table.score.replace('_', ' ')} on each experience, from when it was learned", loc="left", color=INK
    )
    figure.legend(loc="outside right center", frameon=False, fontsize=8, ncols=1 if k <= 20 else 2)
    return figure


def matrix(table: ScoreTable, names: Sequence[str] | None = None) -> Figure:
    """R as a heat map, dark is good; rows are trained, columns tested. Numbers up to 20 experiences, cells of up to 100."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    chosen = spread(table.experiences, CELLS)
    k, r = len(chosen), table.R[chosen][:, chosen]
    size = min(max(0.62 * k + 2.6, 4.6), 14.0)
    figure = Figure(figsize=(size + 0.9, size), layout="constrained")
    axes = figure.add_subplot()
    low, high = _limits(table)
    colors = colormaps["Blues" if table.higher_is_better else "Blues_r"].with_extremes(bad="#f4f4f4")
    image = axes.imshow(r.numpy(), cmap=colors, vmin=low, vmax=high, interpolation="none")
    for i in range(k if k <= 20 else 0):
        for j in range(k):
            if not r[i, j].isnan():
                share = (float(r[i, j]) - low) / (high - low)
                dark = share > 0.6 if table.higher_is_better else share < 0.4
                text = f"{r[i, j]:.2f}"
                weight = "bold" if i == j else "normal"
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK, weight=weight,
                    gid=f"cell-{i}-{j}",
                )  # fmt: skip
    ticks = list(range(0, k, max(1, k // 20)))
    everything = labels(table.experiences, names)
    shown = [everything[i] for i in chosen]
    axes.set_xticks(ticks, [shown[t] for t in ticks], rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(ticks, [shown[t] for t in ticks], fontsize=8)
    axes.set_xlabel("tested on")
    axes.set_ylabel("after training on")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("R: every experience after every experience", loc="left", fontsize=10, color=INK)
    figure.colorbar(image, ax=axes, shrink=0.8, label=_words(table)).outline.set_visible(False)  # type: ignore[operator]  # matplotlib types it as a list
    return figure


def html(table: ScoreTable, names: Sequence[str] | None = None) -> str:
    """Both figures as one page with nothing to load: point at a line, a name or a cell to read its numbers."""
    k, known = table.experiences, names or labels(table.experiences)
    spoken = {f"curve-{j}": f"{known[j]}: {_numbers(curve(table, j)[1])}" for j in range(k)}
    spoken["curve-average"] = f"average so far: {_numbers(_averages(table))}"
    cells = {(i, j): float(table.R[i, j]) for i in range(k if k <= 20 else 0) for j in range(k)}
    spoken |= {f"cell-{i}-{j}": f"after {known[i]}, on {known[j]}: {x:.4f}" for (i, j), x in cells.items()}
    drawings = "\n".join(_drawing(figure, spoken) for figure in (curves(table, names), matrix(table, names)))
    return PAGE.format(title=escape(f"{table.score.replace('_', ' ')} on {k} experiences"), drawings=drawings)


def _drawing(figure: Figure, spoken: Mapping[str, str]) -> str:
    # matplotlib's svg, its text as text; a title inside an element is what a browser shows at the mouse.
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "clplat"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = f"<svg{file.getvalue().partition('<svg')[2]}"
    text = re.sub(r"font-family: [^;]+; ", "", text)  # said once, in the page's style
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    for identity, words in spoken.items():
        text = text.replace(f'<g id="{identity}">', f'<g id="{identity}"><title>{escape(words)}</title>', 1)
    return text


def _numbers(values: Sequence[float]) -> str:
    shown = [f"{value:.3f}" for value in values]
    return " ".join(shown if len(shown) <= 50 else [*shown[:25], "...", *shown[-24:]])


def _averages(table: ScoreTable) -> list[float]:
    return after_each(average_accuracy, table.R[: table.finished, : table.finished]).tolist()


def _words(table: ScoreTable) -> str:
    return f"{table.score.replace('_', ' ')} ({'higher' if table.higher_is_better else 'lower'} is better)"


def _limits(table: ScoreTable) -> tuple[float, float]:
    if table.score == "accuracy":
        return 0.0, 1.0
    known = table.R[~table.R.isnan()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return low, max(high, low + 1e-9)

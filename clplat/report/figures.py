"""Figures of one run: forgetting curves, and R as a heat map.

They are pictures, or one page that needs no network. matplotlib and plotly are imported where they are used. Figures are
made without pyplot, so nothing global changes and nothing has to be closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clplat.metrics import after_each, average_accuracy
from clplat.scores import ScoreTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, AVERAGE = "#222222", "#dddddd", "#111111"


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

    k = table.experiences
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shades = colormaps["viridis"]([0.9 * j / max(k - 1, 1) for j in range(k)])
    for j, label in enumerate(labels(k, names)):
        x, y = curve(table, j)
        dense = table.has_between
        axes.plot(
            x, y, color=shades[j], linewidth=1.2 if dense else 1.8, marker="" if dense else "o", ms=4, label=label
        )
    average = after_each(average_accuracy, table.R[: table.finished, : table.finished])
    x = list(range(1, table.finished + 1))
    axes.plot(x, average.tolist(), color=AVERAGE, linewidth=2.6, marker="s", ms=5, label="average so far", zorder=5)
    axes.set_xlabel("experiences seen")
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
    """R as a heat map, dark is good; rows are trained, columns tested. Numbers up to 20 experiences."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    k, r = table.experiences, table.R
    size = min(max(0.62 * k + 2.6, 4.6), 14.0)
    figure = Figure(figsize=(size + 0.9, size), layout="constrained")
    axes = figure.add_subplot()
    low, high = _limits(table)
    colors = colormaps["Blues" if table.higher_is_better else "Blues_r"].with_extremes(bad="#f4f4f4")
    image = axes.imshow(r.numpy(), cmap=colors, vmin=low, vmax=high)
    for i in range(k if k <= 20 else 0):
        for j in range(k):
            if not r[i, j].isnan():
                share = (float(r[i, j]) - low) / (high - low)
                dark = share > 0.6 if table.higher_is_better else share < 0.4
                text = f"{r[i, j]:.2f}"
                weight = "bold" if i == j else "normal"
                axes.text(
                    j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK, weight=weight
                )
    ticks = list(range(0, k, max(1, k // 20)))
    shown = labels(k, names)
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
    """Both figures as one page to hover over; plotly.js is inside it (about 4.5 MB)."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from plotly.graph_objects import Heatmap, Scatter
    from plotly.subplots import make_subplots

    k, shown = table.experiences, labels(table.experiences, names)
    titles = ("Forgetting curves", "R: after training on (rows), tested on (columns)")
    figure: Any = make_subplots(rows=1, cols=2, column_widths=[0.55, 0.45], subplot_titles=titles)
    for j, label in enumerate(shown):
        x, y = curve(table, j)
        line = {"color": to_hex(colormaps["viridis"](0.9 * j / max(k - 1, 1))), "width": 1.8}
        mode = "lines" if table.has_between else "lines+markers"
        figure.add_trace(Scatter(x=x, y=y, name=label, mode=mode, line=line), row=1, col=1)
    average = after_each(average_accuracy, table.R[: table.finished, : table.finished]).tolist()
    x = list(range(1, table.finished + 1))
    figure.add_trace(Scatter(x=x, y=average, name="average so far", line={"color": AVERAGE, "width": 3}), row=1, col=1)
    low, high = _limits(table)
    cells = [[None if value != value else value for value in row] for row in table.R.tolist()]
    numbers = "%{z:.2f}" if k <= 20 else ""
    scale = {"colorscale": "Blues", "reversescale": not table.higher_is_better, "zmin": low, "zmax": high}
    heat = Heatmap(z=cells, x=shown, y=shown, texttemplate=numbers, hoverongaps=False, colorbar={"x": 1.0}, **scale)
    figure.add_trace(heat, row=1, col=2)
    figure.update_xaxes(title_text="experiences seen", dtick=max(1, k // 12), row=1, col=1)
    limits = [-0.02, 1.04] if table.score == "accuracy" else None
    figure.update_yaxes(title_text=_words(table), range=limits, row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=1, col=2)
    figure.update_layout(template="simple_white", height=620, legend={"orientation": "h", "y": -0.2}, margin={"t": 60})
    return figure.to_html(include_plotlyjs=True, full_html=True)


def _words(table: ScoreTable) -> str:
    return f"{table.score.replace('_', ' ')} ({'higher' if table.higher_is_better else 'lower'} is better)"


def _limits(table: ScoreTable) -> tuple[float, float]:
    if table.score == "accuracy":
        return 0.0, 1.0
    known = table.R[~table.R.isnan()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    return low, max(high, low + 1e-9)

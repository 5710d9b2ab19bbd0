"""The picture of a sweep: what each setting did to the validation metric, one panel a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Every trial of a sweep imports this module too, and draws nothing: matplotlib is imported by what draws.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _BLUE, _ORANGE, _GREY = "#222222", "#0072B2", "#D55E00", "#9a9a9a"
_COLUMNS = 3
_LABELLED = 12


@dataclass(frozen=True)
class Panel:
    """One parameter and all measured trials."""

    title: str
    """Dotted key of the parameter."""
    names: Sequence[str]
    """[T], of the trials."""
    values: Sequence[Any]
    """[T], of each trial."""
    texts: Sequence[str]
    """[T], the values for people."""
    scores: Sequence[float]
    """[T], the validation metric."""
    finished: Sequence[bool]
    """[T], whether the trial was trained to its end."""
    means: Sequence[tuple[str, float]]
    """Listed values (as texts) and the mean score of their finished trials; empty for a range."""


def effect_plot(path: Path, panels: Sequence[Panel], metric: str) -> None:
    """Write the panels as a PNG.

    Args:
        path: file to write.
        panels: at least one; all with the same trials in the same order.
        metric: name of the metric, such as ``recall@100``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(
        figsize=(max(6.4, 5.2 * columns), 4.4 * rows),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15),
        facecolor="white",
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(f"validation {metric}, best epoch")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import NullLocator

    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in panel.values)
    texts = list(dict.fromkeys(panel.texts))
    places = list(panel.values) if numeric else [texts.index(text) for text in panel.texts]
    place_of = dict(zip(panel.texts, places, strict=True))
    if panel.means:
        line = [(place_of[text], mean) for text, mean in panel.means]
        axes.plot(*zip(*sorted(line), strict=True), color=_GREY, zorder=1, label="mean of finished trials")
    best = max(range(len(places)), key=lambda i: panel.scores[i])
    for finished, face, name in ((True, _BLUE, "finished"), (False, "none", "stopped early")):
        chosen = [i for i in range(len(places)) if panel.finished[i] is finished]
        if chosen:
            axes.scatter(
                [places[i] for i in chosen],
                [panel.scores[i] for i in chosen],
                s=34,
                facecolors=face,
                edgecolors=_BLUE,
                zorder=2,
                label=name,
            )
    axes.scatter(places[best], panel.scores[best], s=150, marker="*", color=_ORANGE, zorder=3, label="best")
    if numeric and min(places) > 0 and max(places) / min(places) >= 10:
        axes.set_xscale("log")
    if len(texts) <= _LABELLED:
        axes.set_xticks(list(place_of.values()), list(place_of), rotation=45 if len(texts) > 5 else 0)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(panel.title, loc="left", fontsize=12, color=_INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)

"""The pictures of a report, drawn without pyplot so that no global state of matplotlib is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

# What ranks and trains imports this module too, and draws nothing: matplotlib is imported by what draws.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_INK = "#222222"
_GREY = "#9a9a9a"
# Okabe and Ito's colours, which people with colour blindness tell apart, and three more.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A4B9A",
    "#8C5A2B",
    "#B8B000",
)
OTHER = "other"
LATENCY_GOAL_MS = 10.0


def training_curves(path: Path, history: Sequence[Mapping[str, Any]], k: int, best_epoch: int | None) -> None:
    """Write loss and validation metrics by epoch as a PNG.

    Args:
        path: file to write.
        history: one mapping an epoch with ``epoch``, ``loss``, ``validation_recall``, ``validation_ndcg``.
        k: cut-off of the validation metrics.
        best_epoch: the epoch whose weights are kept.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history], marker="o", markersize=4, color=_COLOURS[0])
    _dress(left, "Training loss", "epoch", "mean loss per example (nats)")
    series = (("validation_recall", f"recall@{k}", 1), ("validation_ndcg", f"NDCG@{k}", 2))
    for key, label, colour in series:
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if points:
            right.plot(
                *zip(*points, strict=True), marker="o", markersize=4, color=_COLOURS[colour], label=label
            )
    _dress(right, "Validation, whole catalogue ranked", "epoch", "mean over users")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(x=0.04)
        if best_epoch is not None:
            axes.axvline(
                best_epoch, color=_GREY, linestyle="--", linewidth=1.2, label=f"kept: epoch {best_epoch}"
            )
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    _save(figure, path)


def latency_histogram(path: Path, milliseconds: NDArray[np.float64], facts: Mapping[str, float]) -> None:
    """Write the histogram of single requests as a PNG.

    Args:
        path: file to write.
        milliseconds: [n] float64.
        facts: ``k``, ``mean_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms`` and ``qps``.
    """
    figure = _figure(10, 4.6)
    axes = figure.subplots()
    # A few stragglers would squeeze everything else into one bar.
    limit = max(LATENCY_GOAL_MS * 1.1, facts["p99_ms"] * 1.4)
    inside = milliseconds[milliseconds <= limit]
    axes.hist(inside, bins=80, range=(0, limit), color=_COLOURS[5], edgecolor="white", linewidth=0.3)
    lines = (
        ("mean_ms", "mean", 0, "-"),
        ("p50_ms", "p50", 2, "-"),
        ("p95_ms", "p95", 4, "-"),
        ("p99_ms", "p99", 1, "-"),
    )
    for key, label, colour, style in lines:
        axes.axvline(
            facts[key],
            color=_COLOURS[colour],
            linestyle=style,
            linewidth=1.6,
            label=f"{label}  {facts[key]:.2f} ms",
        )
    axes.axvline(
        LATENCY_GOAL_MS, color=_INK, linestyle="--", linewidth=1.4, label=f"goal  {LATENCY_GOAL_MS:.0f} ms"
    )
    beyond = len(milliseconds) - len(inside)
    tail = f"; {beyond} slower ones are beyond the axis" if beyond else ""
    _dress(
        axes,
        f"Retrieval latency: {facts['qps']:,.0f} requests per second, one at a time",
        f"milliseconds for one request of k = {facts['k']:.0f}{tail}",
        f"requests (of {len(milliseconds):,})",
    )
    axes.set_xlim(0, limit)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    _save(figure, path)


def item_map(
    path: Path,
    points: NDArray[np.float64],
    groups: Sequence[str],
    titles: Sequence[str | None],
    group_name: str,
) -> None:
    """Write a map of items, coloured by group, as a PNG; popular ones that find room get their title.

    Args:
        path: file to write.
        points: [M, 2] float64 places, the most popular item first.
        groups: [M] such as the main genre; the largest nine get a colour each, the rest is ``other``.
        titles: [M].
        group_name: what a group is, such as ``genres``.
    """
    figure = _figure(11, 8)
    axes = figure.subplots()
    sizes = Counter(group for group in groups if group != OTHER)
    largest = [group for group, _ in sizes.most_common(len(_COLOURS))]
    colours = dict(zip(largest, _COLOURS, strict=False))
    drawn = np.array([group if group in colours else OTHER for group in groups])
    for group in [*largest, OTHER]:
        chosen = drawn == group
        if chosen.any():
            colour = colours.get(group, "#cfcfcf")
            label = f"{_short(group, 24)} ({int(chosen.sum()):,})"
            axes.scatter(
                points[chosen, 0],
                points[chosen, 1],
                s=14,
                color=colour,
                alpha=0.8,
                linewidths=0,
                label=label,
                zorder=1 if group == OTHER else 2,
            )
    _dress(axes, f"Item vectors, the {len(points):,} most popular items (t-SNE)", "", "")
    axes.set_xlabel("t-SNE places items with similar vectors close together; its axes have no unit")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.margins(0.06)
    title = f"{group_name} (first named)" if group_name else ""
    axes.legend(
        title=title,
        frameon=False,
        markerscale=1.8,
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
    )
    _write_titles(figure, axes, points, titles, most=24)
    _save(figure, path)


def _write_titles(
    figure: Figure, axes: Axes, points: NDArray[np.float64], titles: Sequence[str | None], most: int
) -> None:
    """Write titles beside their points, leaving out those that would cover another or leave the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw(renderer)
    frame = axes.get_window_extent(renderer)
    taken: list[Any] = []
    for point, title in zip(points, titles, strict=True):
        if len(taken) == most:
            break
        if not title:
            continue
        text = axes.annotate(
            _short(title, 40), point, xytext=(4, 3), textcoords="offset points", fontsize=7.5, color=_INK,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )  # fmt: skip
        box = text.get_window_extent(renderer).padded(6)
        outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
        if outside or any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)
            axes.scatter(
                point[0], point[1], s=26, facecolors="none", edgecolors=_INK, linewidths=0.8, zorder=3
            )


def _short(text: str, length: int) -> str:
    # A dollar sign would start a formula.
    text = text if len(text) <= length else text[: length - 1].rstrip() + "…"
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    return Figure(figsize=(width, height), dpi=_DPI, layout=layout, facecolor="white")


def _dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=_INK, pad=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", metadata={"Software": None})

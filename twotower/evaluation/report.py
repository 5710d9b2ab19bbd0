"""The report of an evaluation: numbers as JSON, a page of Markdown, and pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel

from twotower.artefacts import write_bytes, write_json
from twotower.data.dataset import Dataset
from twotower.evaluation import plots
from twotower.evaluation.outcomes import column_name
from twotower.evaluation.page.render import write_page
from twotower.evaluation.report_text import markdown
from twotower.listing import STORED
from twotower.values import is_list


@dataclass(frozen=True)
class ItemMap:
    """Items on a map, the most popular first."""

    points: NDArray[np.float64]
    """[M, 2] float64."""
    groups: list[str]
    """[M], such as the main genre."""
    titles: list[str | None]
    """[M]."""
    group_name: str
    """Column that the groups come from; empty where there is none."""


@dataclass(frozen=True)
class Results:
    """Everything that a report tells."""

    inputs: dict[str, Any]
    """Names and fingerprints of what was evaluated."""
    counts: dict[str, int]
    """Users, from ``Holdout.counts``, and ``items`` of the catalogue."""
    metrics: dict[str, dict[str, float]]
    """By ranker (keys of ``report_text.TITLES``), then by metric."""
    history: list[dict[str, Any]]
    """Of the training, one mapping an epoch."""
    best_epoch: int | None
    """The epoch whose weights were evaluated."""
    validation_k: int
    """Cut-off of the metrics in ``history``."""
    latencies_ms: NDArray[np.float64] | None
    """[n] float64, single requests; None where no generation was given."""
    latency_k: int
    """Items asked for by those requests."""
    map: ItemMap | None
    """None where the catalogue is too small for one."""
    left_out: dict[str, str] = field(default_factory=dict)
    """By ranker that is not measured, the reason."""
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By baseline, what it was fitted with."""
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By ranker and metric, the 95% interval of the mean."""
    differences: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By ranker and metric, what the model is better by: ``intervals.differences``."""
    slices: list[dict[str, Any]] = field(default_factory=list)
    """``by``, ``value``, ``users`` and ``metrics`` by ranker of each slice."""
    collapse: str | None = None
    """A sentence where the model gives most users the same answer."""
    shown: dict[str, Any] = field(default_factory=dict)
    """What the page shows beside them: ``about``, ``recall_by_k``, ``exposure`` and ``examples``."""


KIND = "report"
_BINS = 55
"""Bars of the histogram of requests in the page."""
_MAP_SIDE = 1000
_PICTURES = {
    "training.png": "Loss and validation metrics by epoch",
    "latency.png": "Retrieval latency",
    "item_map.png": "Map of the item vectors",
}


class ReportManifest(BaseModel):
    """The manifest of a report."""

    model_config = STORED

    metrics: dict[str, float | None]
    by_ranker: dict[str, dict[str, float | None]]


def latency_facts(milliseconds: NDArray[np.float64], k: int) -> dict[str, float]:
    """Return the facts of single requests made one at a time: percentiles in ms, and requests per second."""
    p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
    return {
        "requests": len(milliseconds),
        "k": k,
        "mean_ms": float(milliseconds.mean()),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "max_ms": float(milliseconds.max()),
        "qps": float(1000.0 / milliseconds.mean()),
        "share_within_10_ms": float((milliseconds <= plots.LATENCY_GOAL_MS).mean()),
    }


def flat_metrics(results: Results) -> dict[str, float]:
    """Return all numbers by one name: ``recall@10`` (model), ``popularity_recall@10``, ``latency_p50_ms``."""
    flat = {
        column_name(ranker, name): value
        for ranker, values in results.metrics.items()
        for name, value in values.items()
    }
    if results.latencies_ms is not None:
        facts = latency_facts(results.latencies_ms, results.latency_k)
        flat |= {f"latency_{name}": facts[name] for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "qps")}
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def write_report(directory: Path, results: Results) -> None:
    """Write report.html, report.json, report.md and the pictures into an existing directory.

    The page shows the configuration that is there already, as config.json.
    """
    pictures: list[str] = []
    if results.history:
        pictures.append("training.png")
        plots.training_curves(
            directory / "training.png", results.history, results.validation_k, results.best_epoch
        )
    latency: dict[str, Any] | None = None
    if results.latencies_ms is not None and len(results.latencies_ms):
        latency = latency_facts(results.latencies_ms, results.latency_k)
        pictures.append("latency.png")
        plots.latency_histogram(directory / "latency.png", results.latencies_ms, latency)
        latency = {**latency, "histogram": latency_bins(results.latencies_ms, latency["p99_ms"])}
    if results.map is not None:
        pictures.append("item_map.png")
        plots.item_map(
            directory / "item_map.png",
            results.map.points,
            results.map.groups,
            results.map.titles,
            results.map.group_name,
        )
    content = {
        "inputs": results.inputs,
        "counts": results.counts,
        "metrics": results.metrics,
        "left_out": results.left_out,
        "baselines": results.baselines,
        "intervals": results.intervals,
        "differences": results.differences,
        "slices": results.slices,
        "collapse": results.collapse,
        "latency": latency,
        "best_epoch": results.best_epoch,
        "validation_k": results.validation_k,
        "history": results.history,
        "pictures": pictures,
        "map": None if results.map is None else map_items(results.map),
        **results.shown,
    }
    write_content(directory, finite(content))


def write_content(directory: Path, content: dict[str, Any]) -> None:
    """Write report.json and the pages made of it."""
    write_json(directory / "report.json", content)
    write_page(directory, content)
    pictures = [(name, _PICTURES[name]) for name in content["pictures"]]
    write_bytes(directory / "report.md", markdown(content, pictures).encode())


def latency_bins(milliseconds: NDArray[np.float64], p99_ms: float) -> dict[str, Any]:
    """Return the histogram of single requests: ``edges_ms``, ``counts``, and how many are ``beyond``.

    A few stragglers would squeeze everything else into one bar, so it ends a little behind p99 and the goal.
    """
    limit = max(plots.LATENCY_GOAL_MS * 1.1, p99_ms * 1.4)
    counts, edges = np.histogram(milliseconds, bins=_BINS, range=(0.0, limit))
    beyond = len(milliseconds) - int(counts.sum())
    return {"edges_ms": edges.round(6).tolist(), "counts": counts.tolist(), "beyond": beyond}


def map_items(items: ItemMap) -> dict[str, Any]:
    """Return a map in columns: ``x`` and ``y`` (whole numbers, 0 to 1000), ``groups``, ``titles``."""
    low = items.points.min(axis=0)
    # One factor for both axes, which keeps the shape.
    places = (items.points - low) * (_MAP_SIDE / max(float(np.ptp(items.points, axis=0).max()), 1e-9))
    x, y = places.round().astype(int).T.tolist()
    return {"group_name": items.group_name, "x": x, "y": y, "groups": items.groups, "titles": items.titles}


def item_groups(dataset: Dataset, rows: NDArray[np.int64]) -> tuple[list[str], str]:
    """Return the main group of items [M] and the column it comes from.

    It is the first value of the first multi_hot item feature (or else the value of the first categorical
    one); an item without a value is ``other``.
    """
    there = dataset.item_table().column_names
    specs = [f.spec for f in dataset.schema.item if f.spec.source_column in there]
    for kind in ("values", "value"):
        for spec in specs:
            if spec.labels_are == kind and spec.source_column is not None:
                column = dataset.item_table([spec.source_column]).column(0).take(pa.array(rows))
                return _first_labels(spec.labels(column.combine_chunks())), spec.source_column
    return [plots.OTHER] * len(rows), ""


def _first_labels(labels: pa.Array) -> list[str]:
    values = labels.to_pylist()
    if is_list(labels.type):
        return [several[0] if several else plots.OTHER for several in values]
    return [plots.OTHER if value is None else value for value in values]


def place_items(vectors: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """Return a t-SNE map [M, 2] float64 of vectors [M, D] float32, M at least 10."""
    from sklearn.manifold import TSNE

    if len(vectors) < 10:
        raise ValueError(f"{len(vectors)} vectors are too few for a map; give at least 10")
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    # PCA to start from, and a seed, so that the same vectors give the same map.
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, max_iter=600, random_state=seed, n_jobs=1)
    return np.asarray(tsne.fit_transform(np.asarray(vectors)), dtype=np.float64)


def finite(value: Any) -> Any:
    """Return the value with None in place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

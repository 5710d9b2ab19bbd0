"""The page of a report as Markdown, and its tables, from the content of report.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TITLES = {
    "model": "model",
    "compared": "compared model",
    "popularity": "popularity",
    "recent_popularity": "recent popularity",
    "item_knn_cosine": "item-kNN cosine",
    "item_knn_tfidf": "item-kNN TF-IDF",
    "ease": "EASE^R",
    "ials": "iALS",
    "true_model": "true model",
}
_NAMES = {
    "recall": "Recall",
    "ndcg": "NDCG",
    "mrr": "MRR",
    "hit_rate": "Hit rate",
    "map": "MAP",
    "precision": "Precision",
    "coverage": "Catalogue coverage",
    "gini": "Gini of what is shown",
    "mean_popularity": "Mean popularity",
    "novelty": "Novelty (bits)",
    "diversity": "Diversity in a list",
}
_NOTES = {
    "popularity": "Popularity ranks by positives in train and validation.",
    "recent_popularity": "Recent popularity counts those of the last tenth of that time.",
    "item_knn_cosine": "Item-kNN adds up the similarities to the items that the query knows.",
    "ease": "EASE^R is the linear model of every item's weights for every other.",
    "ials": "iALS is the matrix factorisation of implicit feedback.",
    "true_model": "The true model ranks by the probabilities that the data was drawn from, the best that a "
    "model can be expected to do.",
}
Metrics = Mapping[str, Mapping[str, float | None]]


def metric_table(metrics: Metrics) -> list[list[str]]:
    """Return the rows of the comparison, the heading first: metric, then each ranker's value."""
    rankers = [name for name in TITLES if name in metrics]
    rows = [["metric", *(TITLES[name] for name in rankers)]]
    for name in metrics[rankers[0]]:
        rows.append([label(name), *(_number(metrics[ranker].get(name)) for ranker in rankers)])
    return rows


def label(name: str) -> str:
    """Return a metric's name for people."""
    if name == "same_top10":
        return "Users with the most common top 10"
    metric, _, k = name.partition("@")
    return f"{_NAMES.get(metric, metric)}@{k}"


def sentences(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what has to be said beside the table: a collapse, and every ranker that is left out."""
    if content["collapse"]:
        yield content["collapse"]
    for ranker, reason in content["left_out"].items():
        yield f"{TITLES.get(ranker, ranker)} is left out: {reason}."


def markdown(content: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    """Return the page of a report.

    Args:
        content: of report.json.
        pictures: file and title of each.
    """
    counts = content["counts"]
    drawn = f" {counts['not_drawn']:,} more were not drawn." if counts["not_drawn"] else ""
    lines = [
        f"# Evaluation of {content['inputs']['name']}",
        "",
        f"{counts['evaluated']:,} test users, each with the whole catalogue of {counts['items']:,} items "
        "ranked. The items of a user's train and validation interactions are left out of the list; the "
        f"positive test items are relevant. {counts['without_relevant']:,} of {counts['users']:,} users have "
        f"no relevant item and are left out.{drawn}",
        "",
        *_table(metric_table(content["metrics"])),
        "",
        "Recall is hits over all relevant items; NDCG is binary, its ideal over min(k, relevant items). "
        + " ".join(note for ranker, note in _NOTES.items() if ranker in content["metrics"]),
    ]
    for sentence in sentences(content):
        lines += ["", sentence]
    lines += [*_differences(content), *_slices(content), *_latency(content["latency"])]
    for name, title in pictures:
        lines += ["", f"## {title}", "", f"![{title}]({name})"]
    named = {key: value for key, value in content["inputs"].items() if key != "name"}
    lines += ["", "## What was evaluated", "", *(f"- {key}: `{value}`" for key, value in named.items())]
    for ranker, settings in content["baselines"].items():
        if settings:
            told = ", ".join(f"{key} {value}" for key, value in settings.items())
            lines.append(f"- {TITLES.get(ranker, ranker)}: {told}")
    return "\n".join([*lines, ""])


def _differences(content: Mapping[str, Any]) -> Iterator[str]:
    if not content["differences"]:
        return
    names = _headline(content["metrics"]["model"])
    rows = [["model minus", *(f"{label(name)} [95%], p" for name in names)]]
    for ranker in (name for name in TITLES if name in content["differences"]):
        found = content["differences"][ranker]
        rows.append([TITLES[ranker], *(_difference(found.get(name)) for name in names)])
    yield from ("", "## How sure the differences are", "", *_table(rows), "")
    yield (
        "Means over users with 95% bootstrap intervals, and p of the paired two-sided t-test. Each user's "
        "metrics are in users.parquet."
    )


def _slices(content: Mapping[str, Any]) -> Iterator[str]:
    slices = content["slices"]
    if not slices:
        return
    name = _headline(content["metrics"]["model"])[-1]
    yield from ("", f"## {label(name)} by slice")
    for by in dict.fromkeys(piece["by"] for piece in slices):
        mine = [piece for piece in slices if piece["by"] == by]
        rankers = [ranker for ranker in TITLES if ranker in mine[0]["metrics"]]
        rows = [[by, "users", *(TITLES[ranker] for ranker in rankers)]]
        for piece in mine:
            values = [_number(piece["metrics"].get(ranker, {}).get(name)) for ranker in rankers]
            rows.append([piece["value"].replace("|", "/"), f"{piece['users']:,}", *values])
        yield from ("", *_table(rows))


def _latency(latency: Mapping[str, float] | None) -> Iterator[str]:
    if latency is None:
        return
    yield ""
    yield (
        f"Retrieval, {latency['requests']:,.0f} single requests of k = {latency['k']:.0f}, one after the "
        f"other and without HTTP: mean {latency['mean_ms']:.2f} ms, p50 {latency['p50_ms']:.2f} ms, p95 "
        f"{latency['p95_ms']:.2f} ms, p99 {latency['p99_ms']:.2f} ms, {latency['qps']:,.0f} requests per "
        f"second; {latency['share_within_10_ms']:.1%} within 10 ms."
    )


def _headline(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics that a few columns have room for: recall and NDCG at the smallest cut-off."""
    ks = [int(name.partition("@")[2]) for name in metrics if name.startswith("recall@")]
    return [f"{name}@{min(ks)}" for name in ("recall", "ndcg")] if ks else [next(iter(metrics))]


def _difference(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    chance = "p < 0.0001" if found["p"] < 1e-4 else f"p = {found['p']:.4f}"
    return f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}], {chance}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    heading, *others = rows
    yield f"| {' | '.join(heading)} |"
    yield f"|---|{'---:|' * (len(heading) - 1)}"
    for row in others:
        yield f"| {' | '.join(row)} |"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"

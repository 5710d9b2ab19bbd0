"""The sections of a report, from what report.json holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from twotower.config import text_of
from twotower.evaluation.page import quality
from twotower.evaluation.page.chart import Cell, Chart, Table, cells
from twotower.evaluation.page.lines import Series, line_chart, step_chart
from twotower.evaluation.page.numbers import (
    APART,
    clean,
    count,
    is_number,
    milliseconds,
    minute,
    moment,
    ranker_name,
    score,
    share,
    short,
    straight,
)
from twotower.evaluation.page.quality import present
from twotower.evaluation.page.rows import bar_chart
from twotower.evaluation.plots import LATENCY_GOAL_MS


@dataclass(frozen=True)
class Item:
    """An item of an example."""

    title: str
    note: str = ""
    hit: bool = False


@dataclass(frozen=True)
class Example:
    """A user, what he or she had, what the model recommends, and what was taken next."""

    user: str
    intro: str
    history: list[Item]
    recommended: list[Item]
    held_out: list[Item]
    key: str = ""
    """Stands in a comment around it, so that it can be found when the user is forgotten."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    intro: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    code: str = ""
    """A line for a shell."""
    tables: list[Table] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    folded: list[tuple[str, str]] = field(default_factory=list)
    """Titles and texts that are shown on request, as they are."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.facts or self.charts or self.code or self.tables or self.examples or self.folded)


def quality_section(content: Mapping[str, Any], metrics: quality.Metrics) -> Section:
    """Return all rankers side by side."""
    counts = content.get("counts") or {}
    drawn, without = counts.get("not_drawn") or 0, counts.get("without_relevant") or 0
    same = any("same_top10" in values for values in metrics.values())
    return Section(
        "quality",
        "Quality",
        f"{count(counts.get('evaluated'))} test users, each with the whole catalogue of "
        f"{count(counts.get('items'))} items ranked. What a user had in train and validation is left out of "
        "the lists, unless repeats are included; positive test items are relevant. "
        + (
            f"{count(without)} of {count(counts.get('users'))} users have no relevant item and are left out. "
            if without
            else ""
        )
        + (f"{count(drawn)} more were not drawn." if drawn else ""),
        charts=[
            *quality.ranker_charts(content, metrics),
            *present([quality.recall_chart(content, metrics)]),
            *quality.difference_charts(content, metrics),
        ],
        tables=quality.metric_tables(content, metrics),
        remarks=[
            *(["Same top 10: the share of users who get the most common list of ten."] if same else []),
            "Bold: the highest of a column, the true model aside. Recall is hits over all relevant items; "
            "NDCG is binary, its ideal over min(k, relevant items).",
            *(f"Not measured: {reason}" for reason in quality.left_out(content)),
        ],
    )


def slice_section(content: Mapping[str, Any], metrics: quality.Metrics) -> Section:
    """Return the same for parts of the users and items."""
    return Section(
        "slices",
        "Slices",
        "Where the model is good and where it is not, beside the best baseline of the whole.",
        charts=quality.slice_charts(content, metrics),
    )


def training_section(content: Mapping[str, Any]) -> Section:
    """Return loss, validation and temperature by epoch."""
    history: list[dict[str, Any]] = [h for h in content.get("history") or [] if is_number(h.get("epoch"))]
    k, best = content.get("validation_k"), content.get("best_epoch")
    epochs = [row["epoch"] for row in history]
    marks = [(float(best), f"kept: {best}")] if is_number(best) and history else []
    ends = f"Epochs {epochs[0]} to {epochs[-1]}" if history else ""

    def curve(title: str, label: str, series: Sequence[Series], zero: bool) -> Chart | None:
        said = "; ".join(
            f"{s.name} from {score(s.points[0][1])} to {score(s.points[-1][1])}" for s in series if s.points
        )
        return line_chart(
            title,
            series,
            "epoch",
            label,
            x_name="epoch",
            summary=f"{ends}: {said}.",
            zero=zero,
            whole=True,
            marks=marks,
        )

    def column(name: str, key: str, style: int) -> Series:
        return Series.of(name, epochs, [row.get(key) for row in history], style)

    charts = [
        curve("Validation", "mean over users", [
            column(f"recall@{k}", "validation_recall", 0), column(f"NDCG@{k}", "validation_ndcg", 1)
        ], True),
        curve("Training loss", "mean per example, nats", [column("loss", "loss", 0)], False),
    ]  # fmt: skip
    temperatures = column("temperature", "temperature", 0)
    if len({value for _, value in temperatures.points}) > 1:
        charts.append(curve("Temperature", "divides the scores", [temperatures], True))
    seconds = [row["seconds"] for row in history if is_number(row.get("seconds"))]
    took = f" One epoch took {sum(seconds) / len(seconds):,.1f}{APART}s on average." if seconds else ""
    kept = f" The weights of epoch {best} are kept, which validation chose." if is_number(best) else ""
    return Section(
        "training",
        "Training",
        f"{len(history)} {'epoch' if len(history) == 1 else 'epochs'}.{kept}{took} Validation ranks the "
        "whole catalogue for users of the last part of train; the test split is not looked at.",
        charts=present(charts) if history else [],
    )


def serving_section(content: Mapping[str, Any]) -> Section:
    """Return what a search finds and takes, and what a request takes."""
    index = (content.get("about") or {}).get("index") or {}
    latency = content.get("latency") or {}
    facts = []
    if index:
        facts = [
            ("index", clean(index.get("factory"), 60)),
            (f"index recall at {count(index.get('recall_k'))}", score(index.get("index_recall"))),
            ("asked for", score(index.get("target_index_recall"))),
            ("one search, p50", milliseconds((index.get("search_ms") or {}).get("p50"))),
            ("one search, p99", milliseconds((index.get("search_ms") or {}).get("p99"))),
        ]
    return Section(
        "serving",
        "Index and latency",
        clean(index.get("reason") or "", 400).capitalize() + "." if index.get("reason") else "",
        facts,
        present([_index_chart(index), _latency_chart(latency)]),
    )


def _index_chart(index: Mapping[str, Any]) -> Chart | None:
    curve = [
        point
        for point in index.get("curve") or []
        if is_number(point.get("search_ms")) and is_number(point.get("index_recall"))
    ]
    if len(curve) < 2:
        return None
    curve.sort(key=lambda point: point["search_ms"])
    points = [(point["search_ms"], point["index_recall"]) for point in curve]
    chosen = next((p for p in curve if p.get("effort") == index.get("effort")), None)
    rows = [
        [
            Cell(_effort(point.get("effort") or {}), number=False),
            Cell(milliseconds(point["search_ms"])),
            Cell(score(point["index_recall"]), strong=point is chosen),
        ]
        for point in curve
    ]
    title = "Index recall against search time"
    found = line_chart(
        title,
        [Series("index recall", points)],
        "median milliseconds of one search",
        f"index recall at {count(index.get('recall_k'))}",
        x_name="search takes",
        summary=f"From {score(points[0][1])} in {milliseconds(points[0][0])} to {score(points[-1][1])} in "
        f"{milliseconds(points[-1][0])}, as the search looks harder.",
        x_text=lambda value: f"{value:.3g}",
        zero=False,
        marks=[(chosen["search_ms"], "in use")] if chosen else [],
        note="Against exact search, on queries that did not tune the search. Each point is one effort.",
    )
    if found is None:
        return None
    return Chart(
        **{**vars(found), "table": Table(title, ["effort", "one search", "index recall"], rows), "keys": []}
    )


def _effort(effort: Mapping[str, Any]) -> str:
    known = [f"{key} {short(value)}" for key, value in effort.items() if is_number(value) and value != 1]
    return ", ".join(known) or "least"


def _latency_chart(latency: Mapping[str, Any]) -> Chart | None:
    bins = latency.get("histogram") or {}
    edges, counts = bins.get("edges_ms") or [], bins.get("counts") or []
    if not edges:
        return None
    marks = [
        (float(latency[key]), f"{label} {latency[key]:.2f}", "rule")
        for key, label in (("p50_ms", "p50"), ("p95_ms", "p95"), ("p99_ms", "p99"))
        if is_number(latency.get(key))
    ]
    marks.append((LATENCY_GOAL_MS, f"goal {LATENCY_GOAL_MS:.0f} ms", "goal"))
    beyond = bins.get("beyond") or 0
    tail = f" {count(beyond)} slower ones are beyond the axis." if beyond else ""
    named = (
        ("mean", "mean_ms"),
        ("p50", "p50_ms"),
        ("p95", "p95_ms"),
        ("p99", "p99_ms"),
        ("slowest", "max_ms"),
    )
    title = "Latency of single requests"
    return step_chart(
        title,
        edges,
        counts,
        marks,
        x_label=f"milliseconds for one request of k = {count(latency.get('k'))}",
        y_label="requests",
        summary=f"Half take up to {milliseconds(latency.get('p50_ms'))}, 99 of 100 up to "
        f"{milliseconds(latency.get('p99_ms'))}; {share(latency.get('share_within_10_ms'))} are within "
        f"{LATENCY_GOAL_MS:.0f} ms.",
        note=f"{count(latency.get('requests'))} requests one after the other, without HTTP: "
        f"{count(latency.get('qps'))} a second, {share(latency.get('share_within_10_ms'))} within "
        f"{LATENCY_GOAL_MS:.0f} ms.{tail}",
        table=Table(
            title,
            ["of the requests", "time"],
            [cells(name, milliseconds(latency.get(key))) for name, key in named],
        ),
        x_text=lambda value: f"{value:.3g}",
    )


def exposure_chart(content: Mapping[str, Any]) -> Chart | None:
    """Return how popular items are that are recommended, beside those that are consumed."""
    exposure = content.get("exposure") or {}
    bands = exposure.get("bands") or []
    if not bands:
        return None
    names = [band["name"] for band in bands]
    columns = [("consumed in test", "consumed", 7), ("recommended", "recommended", 0)]
    title = "Popularity: recommended against consumed"
    rows = [
        cells(band["name"], count(band.get("items")), *(share(band.get(key)) for _, key, _ in columns))
        for band in bands
    ]
    head = bands[-1]
    return bar_chart(
        title,
        names,
        [band.get("label") or band["name"] for band in bands],
        [(name, [float(band.get(key) or 0.0) for band in bands], style) for name, key, style in columns],
        x_label="interactions of an item before test",
        y_label="share",
        summary=f"Items with {head['name']} interactions get {share(head.get('recommended'))} of the top "
        f"{count(exposure.get('k'))} places and {share(head.get('consumed'))} of what users took next.",
        text=share,
        axis=lambda value: f"{100 * value:g}%",
        table=Table(title, ["interactions before test", "items", *(name for name, _, _ in columns)], rows),
        note=f"Recommended: places in the top {count(exposure.get('k'))} of all test users. A model that "
        "only repeats what is popular has its columns further right than what is consumed.",
    )


def example_section(content: Mapping[str, Any]) -> Section:
    """Return a few users with what they had, what is recommended, and what they took next."""
    examples = [_example(example) for example in content.get("examples") or []]
    return Section(
        "examples",
        "Example users",
        "Drawn with the seed, from users of little to much history; not chosen for how good they look. A "
        "tick marks what the user did take in the test split.",
        examples=examples,
    )


def _example(example: Mapping[str, Any]) -> Example:
    had, relevant = example.get("num_history"), example.get("num_held_out")
    hits = sum(bool(item.get("hit")) for item in example.get("recommended") or [])

    def items(key: str, note: str) -> list[Item]:
        found = example.get(key) or []
        return [
            Item(
                clean(item.get("title") or item.get("item_id"), 120),
                " · ".join(filter(None, (_note(item, note), clean(item.get("group") or "", 40)))),
                bool(item.get("hit")),
            )
            for item in found
        ]

    return Example(
        clean(example.get("user_id"), 60),
        f"{count(had)} items known before, {count(relevant)} taken in test; {hits} of them in this top "
        f"{len(example.get('recommended') or [])}.",
        items("history", "time"),
        items("recommended", "score"),
        items("held_out", ""),
        clean(example.get("key") or "", 64),
    )


def _note(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if key == "time":
        return moment(value)[:10]
    return f"{value:.3f}" if is_number(value) else ""


def run_section(content: Mapping[str, Any], config: Mapping[str, Any] | None) -> Section:
    """Return what was evaluated: data, split, model and lineage."""
    about = content.get("about") or {}
    section = config_section(content.get("inputs") or {}, config)
    shown = dict(about.get("tables") or {})
    shown["Baselines"] = {
        ranker_name(name): ", ".join(
            f"{key.replace('_', ' ')} {text_of(value)}" for key, value in settings.items()
        )
        for name, settings in (content.get("baselines") or {}).items()
        if settings
    }
    tables = [
        Table(title, ["", ""], [_fact(name, value) for name, value in rows.items()])
        for title, rows in shown.items()
        if rows
    ]
    return replace(section, intro=clean(about.get("rule") or "", 600), tables=[*tables, *section.tables])


def config_section(inputs: Mapping[str, Any], config: Mapping[str, Any] | None) -> Section:
    """Return names and fingerprints, and the configuration on request."""
    rows = [_fact(name, "none" if value is None else value) for name, value in inputs.items()]
    text = straight(json.dumps(config, indent=2, ensure_ascii=False, default=str)) if config else ""
    return Section(
        "run",
        "What was run",
        tables=[Table("Lineage", ["", ""], rows)],
        folded=[("Configuration", text)] if text else [],
    )


def _fact(name: str, value: Any) -> list[Cell]:
    shown = value
    if isinstance(value, int) and not isinstance(value, bool) and name != "seed":
        shown = count(value)
    elif name == "made":
        shown = minute(value)
    return [Cell(clean(name, 60).replace("_", " "), number=False), Cell(clean(shown, 300), number=False)]

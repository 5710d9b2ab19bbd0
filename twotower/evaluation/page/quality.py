"""How good the model is: the verdict, the tables of metrics, what differs from each baseline, and slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twotower.evaluation.metrics import METRICS
from twotower.evaluation.page.chart import COLOURS, Cell, Chart, Key, Table
from twotower.evaluation.page.lines import Series, line_chart
from twotower.evaluation.page.numbers import (
    NONE,
    RANKERS,
    clean,
    count,
    is_number,
    mentioned,
    metric_name,
    parts_of,
    ranker_name,
    score,
    share,
)
from twotower.evaluation.page.rows import Dot, Row, dot_chart

Metrics = Mapping[str, Mapping[str, Any]]
COMPARED = "compared"
"""Another model among the rankers, which was asked for."""
_CUT_OFF = 10
"""The cut-off that is looked at first, where it is among those measured."""


@dataclass(frozen=True)
class Verdict:
    """What to take from the numbers, in sentences."""

    headline: str
    sentences: list[str]
    tone: str
    """``good``, ``bad`` or ``even``."""


def metrics_of(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics by ranker, the model first, the true model last, baselines from the best down."""
    metrics = {name: dict(values) for name, values in (content.get("metrics") or {}).items() if values}
    first = primary(metrics)[0]
    ends = {"model": -1, "true_model": 1}

    def order(name: str) -> tuple[int, float]:
        value = metrics[name].get(first)
        return ends.get(name, 0), -value if is_number(value) else 0.0

    return {name: metrics[name] for name in sorted(metrics, key=order)}


def cut_offs(metrics: Metrics) -> list[int]:
    """Return the cut-offs that were measured, ascending."""
    found = {parts_of(name)[1] for values in metrics.values() for name in values}
    return sorted(k for k in found if k is not None)


def primary(metrics: Metrics) -> list[str]:
    """Return the metrics that are looked at first: NDCG and recall at 10, or what there is of them."""
    ks = cut_offs(metrics)
    k = _CUT_OFF if _CUT_OFF in ks else (ks[0] if ks else 0)
    known = [name for values in metrics.values() for name in values]
    chosen = [name for name in (f"ndcg@{k}", f"recall@{k}") if name in known]
    return chosen or list(dict.fromkeys(known))[:1] or [""]


def style_of(ranker: str, metrics: Metrics) -> int:
    """Return the colour of a ranker, the same wherever it occurs."""
    known = list(RANKERS)
    others = [name for name in sorted(metrics) if name not in RANKERS]
    return (known.index(ranker) if ranker in known else len(known) + others.index(ranker)) % COLOURS


def baselines(metrics: Metrics) -> list[str]:
    """Return the rankers that the model has to beat."""
    return [name for name in metrics if name not in ("model", "true_model")]


def verdict(content: Mapping[str, Any], metrics: Metrics) -> Verdict:
    """Return what the numbers come to, beside the best baseline."""
    counts = content.get("counts") or {}
    first = primary(metrics)[0]
    model = metrics.get("model", {})
    value = model.get(first)
    sentences = []
    measured = [f"{metric_name(name)} {score(model.get(name))}" for name in primary(metrics) if name in model]
    if measured:
        sentences.append(
            f"{' and '.join(measured)} on {count(counts.get('evaluated'))} test users, each with the whole "
            f"catalogue of {count(counts.get('items'))} items ranked."
        )
    others = {
        name: metrics[name][first] for name in baselines(metrics) if is_number(metrics[name].get(first))
    }
    if not is_number(value) or not others:
        return Verdict("There is no baseline to compare with", sentences, "even")
    # Where another model was asked for, it is the one to be compared with.
    best = COMPARED if COMPARED in others else max(others, key=lambda name: others[name])
    name, beaten = mentioned(best), others[best]
    known = ((content.get("differences") or {}).get(best) or {}).get(first) or {}
    low, high = _ends([known.get("low"), known.get("high")])
    certain = low is not None and high is not None
    even = low <= 0 <= high if low is not None and high is not None else value == beaten
    ratio = f"{value / beaten:.2f} times" if beaten else "infinitely many times"
    if even:
        headline, tone = f"No better than {name}, as far as can be told", "even"
    elif value > beaten:
        what = "" if best == COMPARED else ", the best baseline here"
        headline, tone = f"{ratio} the {metric_name(first)} of {name}{what}", "good"
    else:
        headline, tone = f"Below {name}: {ratio} its {metric_name(first)}", "bad"
    if certain:
        p = known.get("p")
        said = f", p {'below 0.001' if p < 0.001 else f'= {p:.3f}'} in a paired test" if is_number(p) else ""
        sentences.append(
            f"The difference of {metric_name(first)} is {signed(known.get('difference'))} (95% interval "
            f"{signed(low)} to {signed(high)}{said})."
        )
    true = metrics.get("true_model", {}).get(first)
    if is_number(true) and true:
        sentences.append(
            f"The true model, which the data was drawn from, reaches {score(true)}: the model has "
            f"{share(value / true)} of it."
        )
    return Verdict(headline, sentences, tone)


def signed(value: Any) -> str:
    """Return a difference with its sign."""
    if not is_number(value):
        return NONE
    return f"{'+' if value >= 0 else chr(0x2212)}{abs(value):.4f}"


def metric_tables(content: Mapping[str, Any], metrics: Metrics) -> list[Table]:
    """Return tables of rankers by metrics: how accurate they are, and what their lists are like.

    All but the first of each kind are folded.
    """
    intervals = content.get("intervals") or {}
    known = list(dict.fromkeys(name for values in metrics.values() for name in values))
    tables = []
    for accurate, title in ((True, "Accuracy"), (False, "The lists")):
        first = True
        rest = [] if accurate else [name for name in known if parts_of(name)[1] is None]
        for k in [*cut_offs(metrics), None]:
            names = [n for n in known if parts_of(n)[1] == k and (parts_of(n)[0] in METRICS) is accurate]
            names = [n for n in names if n not in rest] + (rest if first else [])
            if names:
                at = f" at {k}" if k is not None else ""
                tables.append(replace(_metric_table(title + at, names, metrics, intervals), folded=not first))
                first = False
    return tables


def _metric_table(title: str, names: Sequence[str], metrics: Metrics, intervals: Metrics) -> Table:
    best = {
        name: max(
            (v[name] for n, v in metrics.items() if n != "true_model" and is_number(v.get(name))),
            default=None,
        )
        for name in names
        if parts_of(name)[0] in METRICS
    }
    rows = []
    for ranker, values in metrics.items():
        row = [Cell(ranker_name(ranker), number=False)]
        for name in names:
            value, interval = values.get(name), (intervals.get(ranker) or {}).get(name)
            around = ""
            if isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_number, interval)):
                around = f"{score(interval[0])} to {score(interval[1])}"
            row.append(Cell(score(value), around, is_number(value) and value == best.get(name)))
        rows.append(row)
    heads = [metric_name(name).partition("@")[0] for name in names]
    return Table(title, ["ranker", *heads], rows, 0 if "model" in metrics else None)


def ranker_charts(content: Mapping[str, Any], metrics: Metrics) -> list[Chart]:
    """Return a chart of all rankers for each of the metrics that are looked at first."""
    intervals = content.get("intervals") or {}
    charts = []
    for name in primary(metrics):
        rows = []
        for ranker, values in metrics.items():
            if is_number(values.get(name)):
                low, high = _ends((intervals.get(ranker) or {}).get(name))
                dot = Dot(metric_name(name), values[name], 0 if ranker == "model" else 7, low, high)
                rows.append(Row(ranker_name(ranker), [dot]))
        known = ", ".join(f"{row.name} {score(row.dots[0].value)}" for row in rows)
        some = any(row.dots[0].low is not None for row in rows)
        note = "Whiskers: 95% bootstrap interval over users." if some else ""
        charts.append(dot_chart(metric_name(name), rows, summary=f"{known}.", note=note))
    return present(charts)


def _ends(interval: Any) -> tuple[float | None, float | None]:
    if isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_number, interval)):
        return float(interval[0]), float(interval[1])
    return None, None


def difference_charts(content: Mapping[str, Any], metrics: Metrics) -> list[Chart]:
    """Return what the model has more or less than each ranker, with the intervals of a paired test."""
    differences = content.get("differences") or {}
    charts = []
    for name in primary(metrics):
        rows, lines = [], []
        for ranker in [*baselines(metrics), *(r for r in differences if r not in metrics)]:
            found = (differences.get(ranker) or {}).get(name) or {}
            if not is_number(found.get("difference")):
                continue
            low, high = _ends([found.get("low"), found.get("high")])
            dot = Dot("difference", found["difference"], 0, low, high)
            p = f"{found['p']:.2g}" if is_number(found.get("p")) else NONE
            rows.append(Row(ranker_name(ranker), [dot], f"p {p}"))
            interval = f"{signed(low)} to {signed(high)}" if low is not None else NONE
            lines.append(
                [Cell(ranker_name(ranker), number=False), Cell(signed(dot.value)), Cell(interval), Cell(p)]
            )
        title = f"{metric_name(name)}: the model minus"
        summary = "; ".join(f"minus {row.name} {signed(row.dots[0].value)}" for row in rows)
        charts.append(
            dot_chart(
                title,
                rows,
                summary=f"{summary}.",
                text=signed,
                zero=False,
                reference=0.0,
                table=Table(title, ["ranker", "difference", "95% interval", "p"], lines),
            )
        )
    return present(charts)


def recall_chart(content: Mapping[str, Any], metrics: Metrics) -> Chart | None:
    """Return recall by the length of the list, of every ranker."""
    by_k = content.get("recall_by_k") or {}
    ks, series = by_k.get("ks") or [], []
    for ranker, values in metrics.items():
        xs, ys = ks, (by_k.get("rankers") or {}).get(ranker)
        if not ys:
            xs = [k for k in cut_offs(metrics) if f"recall@{k}" in values]
            ys = [values[f"recall@{k}"] for k in xs]
        series.append(Series.of(ranker_name(ranker), xs, ys, style_of(ranker, metrics)))
    model = next((s.points for s in series if s.points), [])
    if len(model) < 2:
        return None
    first, last = model[0], model[-1]
    return line_chart(
        "Recall by k",
        series,
        "k, items in the list",
        "recall",
        x_name="k =",
        summary=f"Recall of the model rises from {score(first[1])} at {first[0]:g} to {score(last[1])} at "
        f"{last[0]:g}.",
        log_x=len(model) > 4,
        whole=True,
    )


def slice_charts(content: Mapping[str, Any], metrics: Metrics) -> list[Chart]:
    """Return a chart for each way in which users or items were sliced: the model beside the best baseline."""
    slices = [s for s in content.get("slices") or [] if (s.get("metrics") or {}).get("model")]
    charts = []
    for by in dict.fromkeys(str(s.get("by")) for s in slices):
        chosen = [s for s in slices if str(s.get("by")) == by]
        known = [name for s in chosen for name in s["metrics"]["model"]]
        name = next((n for n in primary(metrics) if n in known), known[0] if known else "")
        rivals = [n for n in baselines(metrics) if any(n in s["metrics"] for s in chosen)]
        rival = rivals[0] if rivals else None
        label = clean(by, 40).replace("_", " ")
        shown = [n for n in metrics if any(n in s["metrics"] for s in chosen)]
        pair = {each: style_of(each, metrics) for each in ["model", rival] if each}
        rows = [
            Row(str(s.get("value")), _dots(s, name, pair), f"{count(s.get('users'))} users") for s in chosen
        ]
        keys = [Key(style, ranker_name(each), "mark") for each, style in pair.items()]
        charts.append(
            dot_chart(
                f"By {label}",
                rows,
                summary=f"{metric_name(name)} of the model"
                + (f" and of {ranker_name(rival)}" if rival else "")
                + f" for each value of {label}: "
                + "; ".join(f"{clean(r.name, 30)} {score(r.dots[0].value)}" for r in rows if r.dots)
                + ".",
                x_label=metric_name(name),
                keys=keys,
                table=Table(
                    f"{metric_name(name)} by {label}",
                    [label, "users", *map(ranker_name, shown)],
                    [_slice_row(s, name, shown) for s in chosen],
                ),
            )
        )
    return present(charts)


def _dots(part: Mapping[str, Any], name: str, pair: Mapping[str, int]) -> list[Dot]:
    values = {ranker: (part["metrics"].get(ranker) or {}).get(name) for ranker in pair}
    return [Dot(ranker_name(r), float(v), pair[r]) for r, v in values.items() if is_number(v)]


def _slice_row(part: Mapping[str, Any], name: str, shown: Sequence[str]) -> list[Cell]:
    values = {ranker: (part["metrics"].get(ranker) or {}).get(name) for ranker in shown}
    best = max((v for n, v in values.items() if n != "true_model" and is_number(v)), default=None)
    return [
        Cell(clean(part.get("value"), 40), number=False),
        Cell(count(part.get("users"))),
        *(Cell(score(v), strong=is_number(v) and v == best) for v in values.values()),
    ]


def left_out(content: Mapping[str, Any]) -> list[str]:
    """Return the rankers that were not measured, with the reasons."""
    return [
        f"{ranker_name(name)}: {clean(reason, 300)}"
        for name, reason in (content.get("left_out") or {}).items()
    ]


def present(charts: Iterable[Chart | None]) -> list[Chart]:
    """Return the charts that have something to show."""
    return [chart for chart in charts if chart is not None]

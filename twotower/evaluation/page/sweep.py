"""The page of a sweep: the best trial, what each setting did, curves of the best trials, and all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower.artefacts import write_bytes
from twotower.config import Config
from twotower.config.tune import TuneConfig
from twotower.evaluation.page.chart import COLOURS, Cell, Table
from twotower.evaluation.page.lines import Series, line_chart
from twotower.evaluation.page.numbers import clean, count, metric_name, score
from twotower.evaluation.page.quality import Verdict, present
from twotower.evaluation.page.render import NAME, render
from twotower.evaluation.page.scatter import effect_chart
from twotower.evaluation.page.sections import Section, config_section
from twotower.evaluation.sweep import TrialResult, effects, label, panels, ranked, set_line, table


def write_sweep_page(
    directory: Path, config: Config, lineage: Mapping[str, Any], results: Sequence[TrialResult]
) -> None:
    """Write report.html of a sweep into an existing directory.

    Args:
        directory: to write into.
        config: what each trial changes.
        lineage: names and fingerprints of what was tried on.
        results: of all trials; at least one was measured.
    """
    metric, k = config.train.validation.metric, config.train.validation.k
    page = sweep_page(config.name, config.tune, lineage, results, metric, k, config.to_stored())
    write_bytes(directory / NAME, page.encode())


def sweep_page(
    name: str,
    tune: TuneConfig,
    lineage: Mapping[str, Any],
    results: Sequence[TrialResult],
    metric: str,
    k: int,
    config: Mapping[str, Any] | None,
) -> str:
    """Return the page of a sweep; see ``write_sweep_page``."""
    order = ranked(results, metric)
    best = order[0]
    epoch = best.best(metric) or {}
    measure = f"{metric}@{k}"
    found = effects(results, tune.parameters, metric)
    scores = [result.score(metric) for result in results if result.best(metric)]
    statuses = [result.status for result in results]
    facts = [
        (f"Validation {metric_name(measure)}", score(best.score(metric))),
        ("Best epoch", f"{epoch.get('epoch', '-')} of {len(best.history)}"),
        ("Worst trial", score(min(scores))),
        *((f"Trials {status}", count(statuses.count(status))) for status in dict.fromkeys(statuses)),
    ]
    charts = [
        effect_chart(
            panel.title,
            panel.values,
            panel.texts,
            panel.scores,
            panel.names,
            panel.finished,
            panel.means,
            measure,
        )
        for panel in panels(results, found, metric)
    ]
    failed = [result for result in results if result.error]
    parts = [
        Section(
            "best", "The best again", "These arguments repeat the best trial.", code=set_line(best.parameters)
        ),
        Section(
            "effects",
            "What each setting did",
            "One dot a trial, at its best epoch; the star is the best one, hollow dots were stopped early. "
            "The grey line is the mean of the finished trials of a value, over the values of the others.",
            charts=present(charts),
        ),
        Section(
            "curves",
            "Validation by epoch",
            f"The best {min(len(order), COLOURS)} of {len(order)} trials.",
            charts=present([_curves(order, metric, measure)]),
        ),
        Section(
            "trials",
            "Trials",
            f"By the best validation {metric_name(measure)} of their epochs. A stopped trial was given up "
            "early by ASHA, so its score is that of fewer epochs.",
            tables=[_trials(results, metric, k)],
            remarks=[f"Failed: {clean(r.name)}: {clean(r.error, 300)}" for r in failed],
        ),
        config_section(lineage, config),
    ]
    sentences = [
        f"{count(len(results))} trials. Validation {metric_name(measure)} goes from {score(min(scores))} to "
        f"{score(max(scores))}; the test split is not looked at."
    ]
    headline = f"Best: {clean(label(best.parameters), 160)}"
    return render("Sweep", clean(name, 60), Verdict(headline, sentences, "even"), "", "", facts, parts)


def _curves(order: Sequence[TrialResult], metric: str, measure: str) -> Any:
    series = [
        Series.of(
            clean(label(result.parameters), 60),
            [report["epoch"] for report in result.history],
            [report.get(f"validation_{metric}") for report in result.history],
            style,
        )
        for style, result in enumerate(order[:COLOURS])
    ]
    return line_chart(
        f"Validation {metric_name(measure)} of the best trials",
        series,
        "epoch",
        metric_name(measure),
        x_name="epoch",
        summary="; ".join(f"{s.name} ends at {score(s.points[-1][1])}" for s in series if s.points) + ".",
        zero=False,
        whole=True,
    )


def _trials(results: Sequence[TrialResult], metric: str, k: int) -> Table:
    heading, *rows = table(results, metric, k)
    status = len(heading) - 1
    cells = [
        [
            Cell(clean(value, 200), number=0 < column < status, strong=place == 0 and column == 0)
            for column, value in enumerate(row)
        ]
        for place, row in enumerate(rows)
    ]
    return Table("All trials", heading, cells, 0)

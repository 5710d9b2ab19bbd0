"""The final evaluation: encode the catalogue, fit the baselines, rank the test users.

This is the only place that reads the test split. Users are ranked by ``evaluation.comparison``; vectors and
baselines lie in files that the workers of a runner memory-map, and so do their measurements.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from twotower.artefacts import building, fingerprint, finished, read_manifest, write_json, write_manifest
from twotower.config import Config, GeneratedSource
from twotower.config.evaluation import BASELINES
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Holdout
from twotower.errors import ArtefactMismatchError, ConfigError
from twotower.evaluation.about import about
from twotower.evaluation.baselines import popularity_counts
from twotower.evaluation.baselines.fit import Fitted
from twotower.evaluation.baselines.rankers import KNOWN, POPULAR
from twotower.evaluation.comparison import Measure, Outcome
from twotower.evaluation.holdout import (
    evaluation_queries,
    holdout_fingerprint,
    query_inputs,
    write_arrays,
)
from twotower.evaluation.intervals import differences, intervals
from twotower.evaluation.lists import TOP_LIST_LENGTH, ItemFacts
from twotower.evaluation.matrix import open_matrix
from twotower.evaluation.metrics import METRICS, metric_names
from twotower.evaluation.outcomes import USERS, Outcomes
from twotower.evaluation.page.render import NAME as PAGE
from twotower.evaluation.portrait import exposure, recall_by_k
from twotower.evaluation.report import (
    KIND,
    ItemMap,
    ReportManifest,
    Results,
    finite,
    flat_metrics,
    item_groups,
    write_report,
)
from twotower.evaluation.report_text import metric_table, sentences
from twotower.evaluation.side_by_side import check_comparable, set_side_by_side
from twotower.evaluation.slices import Slice, attribute_vectors, item_slices, user_slices
from twotower.evaluation.summary import collapse_of, slice_tables
from twotower.generations.manifest import generation_manifest
from twotower.lifecycle.catalogue import Catalogue
from twotower.model.checkpoint import Checkpoint
from twotower.pipeline.baselines import Fits
from twotower.pipeline.encode import encode_catalogue
from twotower.pipeline.examples import ShownExamples
from twotower.pipeline.ranking import WARM_UP, RankUsers, join_vectors, place_popular, time_requests
from twotower.pipeline.runner import Begin, Runner, one_process, ranges
from twotower.progress import bar, say
from twotower.schema import KINDS, SPLITS

_VERSION = 4
"""Changes whenever the same inputs give another report."""

_FEWEST_ON_MAP = 10


def evaluate(
    config: Config,
    dataset: Dataset,
    checkpoint_dir: Path,
    generation_dir: Path | None,
    begin: Begin = one_process,
) -> Path:
    """Measure a model on the test split, beside baselines, and return the directory of the report.

    Args:
        config: the configuration.
        dataset: what the model was trained on.
        checkpoint_dir: a checkpoint fitted on the train split.
        generation_dir: whose request latency is measured; it may hold a refit of the model.
        begin: yields who does the work; this process where it is not given.

    Returns:
        ``config.reports / ID``; the manifest holds ``metrics``. The same inputs are evaluated once.

    Raises:
        ConfigError: the checkpoint has been fitted on the test split.
        ArtefactMismatchError: checkpoint or generation are of another dataset.
        DataError: no user has a relevant test item.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    generation = None if generation_dir is None else generation_manifest(generation_dir)
    _check(dataset, checkpoint, generation)
    inputs = {
        "name": config.name,
        "dataset": dataset.fingerprint,
        "checkpoint": checkpoint.fingerprint,
        "generation": None if generation is None else generation["id"],
        "seed": config.seed,
    }
    section = config.evaluation.model_dump(mode="json")
    # A program may have registered more of them since.
    measured = {"metrics": METRICS.names, "baselines": BASELINES.names}
    asked = {**inputs, **measured, "evaluation": section, "version": _VERSION}
    directory = config.reports / fingerprint(asked)
    if known := finished(directory, KIND, ReportManifest):
        say(f"report {directory.name} is there already: {directory / PAGE}")
        show(known["by_ranker"], known.get("said", []))
        return directory
    with building(directory) as partial, begin(config) as runner:
        scratch = partial / "scratch"
        try:
            results = _measure(
                config, dataset, checkpoint, generation_dir, generation, inputs, partial, runner
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        write_json(partial / "config.json", config.to_stored())
        write_report(partial, results)
        said = list(sentences({"collapse": results.collapse, "left_out": results.left_out}))
        facts = {**results.inputs, "metrics": flat_metrics(results), "by_ranker": finite(results.metrics)}
        content = {"id": directory.name, **facts, "counts": results.counts, "said": said}
        write_manifest(partial, KIND, content)
    show(results.metrics, said)
    say(f"the report: {directory / PAGE}")
    return directory


def set_beside(
    config: Config,
    dataset: Dataset,
    checkpoint_dir: Path,
    generation_dir: Path | None,
    other: Path,
    begin: Begin = one_process,
) -> Path:
    """Return the report of a model with that of another report beside it; see ``evaluate``.

    Raises:
        ArtefactMismatchError: the other report is of another test; nothing was evaluated.
    """
    settings = config.evaluation
    held = evaluation_queries(dataset, settings.repeats, settings.max_users, config.seed)
    split = holdout_fingerprint(held, dataset.vocabulary_hash)
    check_comparable(split, dataset.fingerprint, f"the test of checkpoint {checkpoint_dir}", other)
    report = set_side_by_side(evaluate(config, dataset, checkpoint_dir, generation_dir, begin), other)
    known = read_manifest(report, KIND, ReportManifest)
    show(known["by_ranker"], known.get("said", []))
    return report


def _check(dataset: Dataset, checkpoint: Checkpoint, generation: dict[str, Any] | None) -> None:
    checkpoint.require_dataset(dataset)
    if checkpoint.dataset_fingerprint != dataset.fingerprint:
        # Another split of the same ids would put test items into the training.
        raise ArtefactMismatchError(
            f"checkpoint {checkpoint.path} was trained on dataset {checkpoint.dataset_fingerprint}, and "
            f"{dataset.path} is {dataset.fingerprint}; evaluate it on its own dataset, or train on this one"
        )
    if checkpoint.manifest.get("fit") == "all":
        raise ConfigError(
            f"checkpoint {checkpoint.path} is fitted on every interaction, the test split included; "
            "evaluate one that is fitted without it"
        )
    if generation is not None and generation["vocabulary_hash"] != dataset.vocabulary_hash:
        raise ArtefactMismatchError(
            f"generation {generation['id']} is of vocabulary {generation['vocabulary_hash']}, and dataset "
            f"{dataset.path} of {dataset.vocabulary_hash}; build a generation of this dataset"
        )


@dataclass(frozen=True)
class _Setup:
    """What is measured of whom, in files that the workers read."""

    scratch: Path
    measure: Measure
    users: list[Slice]
    items: list[Slice]
    known: NDArray[np.int64]
    """[Q], catalogue items that each query knows."""

    @property
    def facts(self) -> Path:
        """Folder of the item facts."""
        return self.scratch / "facts"


def _measure(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    generation_dir: Path | None,
    generation: dict[str, Any] | None,
    inputs: dict[str, Any],
    partial: Path,
    runner: Runner,
) -> Results:
    scratch = (partial / "scratch").absolute()
    settings = config.evaluation
    held = evaluation_queries(dataset, settings.repeats, settings.max_users, config.seed)
    write_arrays(scratch, held, query_inputs(dataset, held.user_rows))
    vectors = str(scratch / "vectors.npy")
    with Fits(config, dataset, held, scratch / "baselines", runner) as fits:
        setup = _set_up(config, dataset, held, scratch)
        catalogue = Catalogue.of(dataset)
        parts = encode_catalogue(checkpoint.path, catalogue, scratch / "parts", config, 1, runner)
        runner.start(join_vectors, parts, dataset.num_catalogue_items, vectors).result()
        fitted = fits.finish()
    shown = np.load(scratch / "baselines" / POPULAR)[: settings.map_items]
    # The map is drawn while users are ranked.
    points = None
    if len(shown) >= _FEWEST_ON_MAP:
        width = checkpoint.embedding_dim - checkpoint.config.model.item_bias
        points = runner.start(place_popular, vectors, shown, width, config.seed)
    examples = ShownExamples(config, dataset, held, checkpoint.path, scratch, runner)
    outcomes = _rank(config, dataset, checkpoint.path, setup, held, fitted, runner)
    merged = outcomes.merged()
    for name, outcome in merged.items():
        assert outcome.sums.num_queries == len(held), (
            f"{name}: {outcome.sums.num_queries} of {len(held)} users"
        )
    outcomes.write_users(partial / USERS, held, setup.known)
    names, others = metric_names(setup.measure.ks), [n for n in outcomes.rankers if n != "model"]
    model = outcomes.values["model"]
    placed = None if points is None else _map(dataset, shown, points.result())
    k = max(settings.ks)
    latencies = None
    if generation_dir is not None:
        users = _drawn(dataset, held, settings.latency_requests + WARM_UP, config.seed)
        latencies = time_requests(generation_dir, users, k)
    return Results(
        inputs={**inputs, "split": holdout_fingerprint(held, dataset.vocabulary_hash)},
        counts={**held.counts, "items": dataset.num_catalogue_items},
        metrics={name: outcome.result() for name, outcome in merged.items()},
        history=list(checkpoint.course.get("history", [])),
        best_epoch=checkpoint.course.get("best_epoch"),
        validation_k=checkpoint.config.train.validation.k,
        latencies_ms=latencies,
        latency_k=k,
        map=placed,
        left_out={name: each.left_out for name, each in fitted.items() if each.left_out},
        baselines={name: each.settings for name, each in fitted.items() if not each.left_out},
        intervals=intervals(outcomes.values, names, config.seed),
        differences=differences(model, outcomes.values, others, names, config.seed),
        slices=slice_tables(outcomes.values, merged, names, setup.users, setup.items),
        collapse=collapse_of(outcomes.overlap(), len(held)),
        shown={
            "about": about(config, dataset, checkpoint, generation),
            "recall_by_k": recall_by_k({n: each.found for n, each in merged.items()}, setup.measure.ks),
            "exposure": _exposure(setup.measure, held, merged["model"]),
            "examples": examples.result(),
        },
    )


def _set_up(config: Config, dataset: Dataset, held: Holdout, scratch: Path) -> _Setup:
    settings = config.evaluation
    known = np.diff(open_matrix(scratch / "baselines" / KNOWN).indptr).astype(np.int64)
    counts = popularity_counts(dataset)
    users = user_slices(dataset, held.user_rows, known, settings.slices)
    items = item_slices(dataset, counts, settings.slices, config.index.attributes)
    facts = ItemFacts(counts, _active_users(dataset), attribute_vectors(dataset))
    members = np.array([piece.members for piece in items]).reshape(len(items), len(counts))
    measure = Measure(sorted(set(settings.ks)), facts, members)
    setup = _Setup(scratch, measure, users, items, known)
    measure.write(setup.facts)
    return setup


def _active_users(dataset: Dataset) -> int:
    log = dataset.interactions
    before = (log.split != SPLITS["test"]) & (log.kind == KINDS["positive"])
    return len(np.unique(log.user_row[before]))


def _exposure(measure: Measure, held: Holdout, model: Outcome) -> dict[str, Any]:
    consumed = np.bincount(held.relevant_rows, minlength=measure.num_items).astype(np.int64)
    place = measure.ks.index(TOP_LIST_LENGTH) if TOP_LIST_LENGTH in measure.ks else 0
    return exposure(measure.facts.counts, consumed, model.lists.shown[place], measure.ks[place])


def _rank(
    config: Config,
    dataset: Dataset,
    checkpoint: Path,
    setup: _Setup,
    held: Holdout,
    fitted: Mapping[str, Fitted],
    runner: Runner,
) -> Outcomes:
    rankers = ["model", *(name for name, each in fitted.items() if not each.left_out)]
    if isinstance(dataset.source, GeneratedSource):
        rankers.append("true_model")
    settings = {
        "scratch": str(setup.scratch),
        "dataset": str(dataset.path.absolute()),
        "checkpoint": str(checkpoint.absolute()),
        "rankers": rankers,
    }
    folder = setup.scratch / "outcomes"
    folder.mkdir()
    with bar(len(held), "rank test users", unit="users") as progress:
        for row in runner.work_through(RankUsers, settings, ranges(len(held), config)):
            progress.update(row["users"])
    return Outcomes(folder, rankers, setup.measure)


def _map(dataset: Dataset, rows: NDArray[np.int64], points: NDArray[np.float64]) -> ItemMap:
    groups, name = item_groups(dataset, rows)
    table = dataset.item_table(["item_id", "title"]).take(pa.array(rows))
    ids, titles = table["item_id"].to_pylist(), table["title"].to_pylist()
    return ItemMap(points, groups, [t or i for t, i in zip(titles, ids, strict=True)], name)


def _drawn(dataset: Dataset, held: Holdout, count: int, seed: int) -> list[str]:
    """Ids of ``count`` test users, drawn with replacement."""
    rows = np.random.default_rng([seed, 3]).choice(held.user_rows, count)
    return dataset.user_ids.ids(rows)


def show(metrics: Mapping[str, Mapping[str, float | None]], said: Sequence[str]) -> None:
    """Print the table of a report, and what has to be said beside it."""
    rows = metric_table(metrics)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            text.ljust(widths[0]) if not i else text.rjust(widths[i]) for i, text in enumerate(row)
        )
        say("  ".join([first, *others]))
    for sentence in said:
        say(sentence)

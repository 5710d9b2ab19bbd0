"""The final evaluation on Ray: encode the catalogue, rank the test users on actors, merge their sums.

This is the only place that reads the test split. Users are ranked by ``evaluation.comparison``, which runs
without Ray; the vectors lie in a file that the actors memory-map.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from twotower.artefacts import building, fingerprint, finished, write_json, write_manifest
from twotower.cluster.encode import encode_catalogue
from twotower.cluster.native_log import without_native_log
from twotower.cluster.pool import pin_threads, ranges, work_through
from twotower.cluster.priority import giving_way
from twotower.cluster.session import session
from twotower.config import Config, GeneratedSource
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Holdout
from twotower.errors import ArtefactMismatchError, ConfigError
from twotower.evaluation.baselines import PopularityRanker, TrueRanker, popular_order
from twotower.evaluation.comparison import ModelRanker, Outcome, Ranker, compare
from twotower.evaluation.holdout import evaluation_queries, open_arrays, query_inputs, write_arrays
from twotower.evaluation.report import (
    KIND,
    ItemMap,
    ReportManifest,
    Results,
    flat_metrics,
    item_groups,
    metric_table,
    place_items,
    write_report,
)
from twotower.index.parts import Part, check_parts
from twotower.model.checkpoint import Checkpoint
from twotower.progress import bar, say
from twotower.retrieval.catalogue import Catalogue
from twotower.retrieval.manifest import generation_manifest
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever

_VERSION = 2
"""Changes whenever the same inputs give another report."""

_WARM_UP = 20
"""Requests before the timed ones."""

_FEWEST_ON_MAP = 10


def evaluate(config: Config, dataset: Dataset, checkpoint_dir: Path, generation_dir: Path | None) -> Path:
    """Measure a model on the test split, beside popularity, and return the directory of the report.

    Args:
        config: the configuration.
        dataset: what the model was trained on.
        checkpoint_dir: a checkpoint fitted on the train split.
        generation_dir: whose request latency is measured; it may hold a refit of the model.

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
    directory = config.reports / fingerprint({**inputs, "evaluation": section, "version": _VERSION})
    if known := finished(directory, KIND, ReportManifest):
        say(f"report {directory.name} is there already")
        _show(known["by_ranker"])
        return directory
    with building(directory) as partial, session(config):
        scratch = partial / "scratch"
        try:
            results = _measure(config, dataset, checkpoint, generation_dir, inputs, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        write_report(partial, results)
        write_json(partial / "config.json", config.to_stored())
        facts = {**inputs, "metrics": flat_metrics(results), "by_ranker": results.metrics}
        write_manifest(partial, KIND, {"id": directory.name, **facts, "counts": results.counts})
    _show(results.metrics)
    return directory


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
            "evaluate one that is fitted on the train split"
        )
    if generation is not None and generation["vocabulary_hash"] != dataset.vocabulary_hash:
        raise ArtefactMismatchError(
            f"generation {generation['id']} is of vocabulary {generation['vocabulary_hash']}, and dataset "
            f"{dataset.path} of {dataset.vocabulary_hash}; build a generation of this dataset"
        )


def _measure(
    config: Config,
    dataset: Dataset,
    checkpoint: Checkpoint,
    generation_dir: Path | None,
    inputs: dict[str, Any],
    scratch: Path,
) -> Results:
    scratch = scratch.absolute()
    settings = config.evaluation
    held = evaluation_queries(dataset, settings.repeats, settings.max_users, config.seed)
    order = popular_order(dataset)
    write_arrays(scratch, held, query_inputs(dataset, held.user_rows))
    np.save(scratch / "popular.npy", order)
    parts = encode_catalogue(checkpoint.path, Catalogue.of(dataset), scratch / "parts", config, num_shards=1)
    vectors = str(scratch / "vectors.npy")
    task = ray.remote(num_cpus=config.cluster.cpus_per_encoder)
    ray.get(task(join_vectors).remote(parts, dataset.num_catalogue_items, vectors))
    shown = order[: config.evaluation.map_items]
    # The map is drawn while users are ranked.
    points = None
    if len(shown) >= _FEWEST_ON_MAP:
        points = task(giving_way(_place)).remote(vectors, shown, config.seed)
    metrics = _rank(config, dataset, checkpoint.path, scratch, held)
    placed = None if points is None else _map(dataset, shown, ray.get(points))
    k = max(config.evaluation.ks)
    latencies = None
    if generation_dir is not None:
        users = _drawn(dataset, held, config.evaluation.latency_requests + _WARM_UP, config.seed)
        latencies = time_requests(generation_dir, users, k)
    return Results(
        inputs=inputs,
        counts={**held.counts, "items": dataset.num_catalogue_items},
        metrics=metrics,
        history=list(checkpoint.manifest.get("history", [])),
        best_epoch=checkpoint.manifest.get("best_epoch"),
        validation_k=checkpoint.config.train.validation.k,
        latencies_ms=latencies,
        latency_k=k,
        map=placed,
    )


def join_vectors(parts: list[Part], num_items: int, path: str) -> None:
    """Write encoded parts as one array [N, D] float32 in the order of item rows, to be memory-mapped."""
    check_parts(parts, num_items)
    dim = parts[0].vectors().shape[1]
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_items, dim))
    for part in parts:
        out[part.item_rows()] = part.vectors()
    out.flush()


def _place(vectors: str, rows: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    pin_threads(1)
    return place_items(np.load(vectors, mmap_mode="r")[rows], seed)


class RankUsers:
    """Ranks ranges of the test users; an actor of the pool."""

    def __init__(
        self, scratch: str, dataset: str, checkpoint: str, ks: list[int], device: str, threads: int
    ) -> None:
        """Open the model and memory-map the vectors and the users.

        Args:
            scratch: folder with the arrays of ``evaluation.holdout``, the vectors and the popular order.
            dataset: directory of the dataset.
            checkpoint: directory of the checkpoint.
            ks: cut-offs.
            device: for the model and the ranking.
            threads: CPU threads.
        """
        pin_threads(threads)
        folder = Path(scratch)
        opened = Dataset.open(dataset)
        self._held, query = open_arrays(folder)
        vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        self._num_items = len(vectors)
        self._ks = ks
        self._rankers: dict[str, Ranker] = {
            "model": ModelRanker(Checkpoint.open(checkpoint, device), query, vectors),
            "popularity": PopularityRanker(np.load(folder / "popular.npy")),
        }
        source = opened.source
        if isinstance(source, GeneratedSource):
            self._rankers["true_model"] = TrueRanker(source, opened.user_ids)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the outcome of each ranker on the range in the first row."""
        start, stop = batch["start"][0].as_py(), batch["stop"][0].as_py()
        outcomes = compare(self._rankers, self._held, start, stop, self._num_items, self._ks)
        rows = [{"users": stop - start, "ranker": name, **o.state()} for name, o in outcomes.items()]
        return pa.Table.from_pylist(rows)


def _rank(
    config: Config, dataset: Dataset, checkpoint: Path, scratch: Path, held: Holdout
) -> dict[str, dict[str, float]]:
    settings = {
        "scratch": str(scratch),
        "dataset": str(dataset.path.absolute()),
        "checkpoint": str(checkpoint.absolute()),
        "ks": config.evaluation.ks,
    }
    merged: dict[str, Outcome] = {}
    with without_native_log(), bar(len(held), "rank test users", unit="users") as progress:
        for row in work_through(RankUsers, settings, ranges(len(held), config), config, gpu=True):
            name = row["ranker"]
            outcome = merged.setdefault(name, Outcome(dataset.num_catalogue_items, config.evaluation.ks))
            outcome.merge({key: row[key] for key in ("sums", "covered", "digests")})
            if name == "model":
                progress.update(row["users"])
    for name, outcome in merged.items():
        assert outcome.sums.num_queries == len(held), (
            f"{name}: {outcome.sums.num_queries} of {len(held)} users"
        )
    return {name: merged[name].result() for name in ("model", "popularity", "true_model") if name in merged}


def _map(dataset: Dataset, rows: NDArray[np.int64], points: NDArray[np.float64]) -> ItemMap:
    groups, name = item_groups(dataset, rows)
    table = dataset.item_table(["item_id", "title"]).take(pa.array(rows))
    ids, titles = table["item_id"].to_pylist(), table["title"].to_pylist()
    return ItemMap(points, groups, [t or i for t, i in zip(titles, ids, strict=True)], name)


def _drawn(dataset: Dataset, held: Holdout, count: int, seed: int) -> list[str]:
    """Ids of ``count`` test users, drawn with replacement."""
    rows = np.random.default_rng([seed, 3]).choice(held.user_rows, count)
    return dataset.user_ids.ids(rows)


def time_requests(generation_dir: Path, user_ids: list[str], k: int) -> NDArray[np.float64]:
    """Return the milliseconds of single requests, one after the other; the first 20 warm up, uncounted."""
    retriever = Retriever.open(generation_dir, threads=1)
    milliseconds = []
    with bar(len(user_ids), "time requests", unit="requests") as progress:
        for user_id in user_ids:
            begin = time.perf_counter()
            retriever.retrieve(Query(user_id=user_id, k=k))
            milliseconds.append((time.perf_counter() - begin) * 1000.0)
            progress.update()
    return np.array(milliseconds[_WARM_UP:])


def _show(metrics: Mapping[str, Mapping[str, float]]) -> None:
    rows = metric_table(metrics)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            text.ljust(widths[0]) if not i else text.rjust(widths[i]) for i, text in enumerate(row)
        )
        say("  ".join([first, *others]))

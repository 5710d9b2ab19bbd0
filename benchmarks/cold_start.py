"""New items by their features alone, new users by their first ten items, on ml-latest-small, three seeds.

    TWOTOWER_MIRROR=/data/movielens python -m benchmarks.cold_start [--quick]

``new_item_recall_at_100_over_random``: a tenth of the items, by a hash, has no interaction in training; users
who had some of them are asked for, and the whole catalogue is ranked. Random is 100 items out of all that the
user has not had. ``new_user_recall_at_20_over_warm``: a tenth of the users, by a hash, has no interaction in
training; their first ten items are the history of a request, the others are the targets. Warm users, whom the
training knows, are asked in the same way.

``only_new_recall_at_100`` is of requests whose history has nothing but new items, those that the user had
before the validation split, whose items are the targets; ``..._ignored`` is where they count for nothing.
``validation_...`` are of the same training, of all users and items.

Drawn negatives that count an item without an example like any other teach that nobody wants new items, so
``negatives.new_item_weight`` is 0.01 here; ``..._at_weight_1`` are of one training with 1, as it is.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks import measure
from benchmarks.effects import BASE, SEEDS
from twotower.config import Config, load_config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.evaluation.holdout import evaluation_queries, query_inputs
from twotower.evaluation.metrics import MetricSums
from twotower.evaluation.ranking import rank_block
from twotower.model.features import QueryFeatures
from twotower.schema import SPLITS
from twotower.training.collectives import World
from twotower.training.loop import Trainer
from twotower.training.validation import encode_catalogue

WEIGHT = "train.negatives.new_item_weight"
SHARE = 10
"""A share of 1 / SHARE of the items, or users, is new."""
FIRST = 10
"""Items of a new user that the request knows."""


def main() -> None:
    """Hold items out, then users; train and measure."""
    quick = measure.start("New items and new users, on ml-latest-small.", 2)
    extra = ["train.epochs=1"] if quick else []
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        same = [f"storage.root={root}", "train.num_workers=1", *extra]
        base = load_config(BASE, [*same, f"{WEIGHT}=0.01"])
        plain = prepare(base)
        (root / "weight-1").mkdir()
        as_it_is = _new_items(load_config(BASE, [*same, f"{WEIGHT}=1"]), plain, root / "weight-1", SEEDS[0])
        figures |= {f"{name}_at_weight_1": [value] for name, value in as_it_is.items()}
        for seed in SEEDS[:1] if quick else SEEDS:
            found = {**_new_items(base, plain, root, seed), **_new_users(base, plain, root, seed)}
            print({name: round(value, 4) for name, value in found.items()}, flush=True)
            for name, value in found.items():
                figures.setdefault(name, []).append(value)
    table: list[list[object]] = [["figure", "mean", "of each seed"]]
    table += [[n, f"{statistics.mean(v):.4f}", ", ".join(f"{x:.4f}" for x in v)] for n, v in figures.items()]
    measure.finish("cold_start", {n: statistics.mean(v) for n, v in figures.items()}, table, quick)


def _new_items(base: Config, plain: Dataset, root: Path, seed: int) -> dict[str, float]:
    new = _drawn(_ids(plain), seed)
    rows = plain.interactions
    config, dataset = _held_out(base, plain, root / f"items-{seed}", new[rows.item_row], seed)
    trainer = _trained(config, dataset)
    vectors = encode_catalogue(trainer.model, trainer.inputs, trainer.world)
    held = evaluation_queries(dataset, "exclude", 1_000_000, seed)
    inputs = query_inputs(dataset, held.user_rows)
    history, weights = inputs.histories.before(np.arange(len(held)), None, dataset.schema.max_history)
    features = QueryFeatures(dataset.schema, inputs.profiles)
    queries = trainer.model.encode_queries(features(held.user_rows, inputs.columns, history, weights))
    sums = MetricSums([100])
    ranked = rank_block(queries.numpy(), vectors, held.masked_offsets, held.masked_rows, 100)
    sums.add(ranked, held.relevant_offsets, held.relevant_rows)
    recall = sums.result()["recall@100"]
    allowed = dataset.num_catalogue_items - np.diff(held.masked_offsets)
    read, ignored = _only_new(trainer, dataset, vectors, _drawn(_ids(dataset), seed))
    best = trainer.history[trainer.best_epoch - 1]
    assert best.validation_recall is not None
    assert best.validation_ndcg is not None
    return {
        "new_item_recall_at_100": recall,
        "new_item_recall_at_100_over_random": recall / float(np.mean(100 / allowed)),
        "only_new_recall_at_100": read,
        "only_new_recall_at_100_ignored": ignored,
        "validation_recall_at_100": best.validation_recall,
        "validation_ndcg_at_100": best.validation_ndcg,
    }


def _only_new(
    trainer: Trainer, dataset: Dataset, vectors: NDArray[np.float32], new: NDArray[np.bool_]
) -> tuple[float, float]:
    """Return recall@100 of the validation items by two new items or more before them, and by nothing."""
    log, length = dataset.interactions, dataset.schema.max_history
    users, histories, had, relevant = [], [], [], []
    for user in range(dataset.num_users):
        part = slice(int(log.user_offsets[user]), int(log.user_offsets[user + 1]))
        items, times = log.item_row[part].astype(np.int64), log.time[part]
        held = log.split[part] == SPLITS["validation"]
        if not held.any():
            continue
        before = items[(times < times[held].min()) & new[items]][::-1][:length]
        if len(before) >= 2:
            users.append(user)
            histories.append(np.append(before, np.full(length - len(before), -1)))
            had.append(np.unique(items[~held]))
            relevant.append(np.setdiff1d(items[held], had[-1]))
    inputs = query_inputs(dataset, np.array(users))
    features, nobody = QueryFeatures(dataset.schema, inputs.profiles), np.full(len(users), -1)
    masked, sizes = np.cumsum([0, *map(len, had)]), np.cumsum([0, *map(len, relevant)])
    found = []
    for history in (np.stack(histories), np.full((len(users), length), -1)):
        batch = features(nobody, inputs.columns, history, np.ones(history.shape, np.float32))
        queries = trainer.model.encode_queries(batch).numpy()
        sums = MetricSums([100])
        sums.add(
            rank_block(queries, vectors, masked, np.concatenate(had), 100), sizes, np.concatenate(relevant)
        )
        found.append(sums.result()["recall@100"])
    return found[0], found[1]


def _ids(dataset: Dataset) -> list[str]:
    """Return the ids of all items."""
    return dataset.item_ids.ids(np.arange(dataset.num_items))


def _new_users(base: Config, plain: Dataset, root: Path, seed: int) -> dict[str, float]:
    new = _drawn(plain.user_ids.ids(np.arange(plain.num_users)), seed)
    rows = plain.interactions
    config, dataset = _held_out(base, plain, root / f"users-{seed}", new[rows.user_row], seed)
    trainer = _trained(config, dataset)
    vectors = encode_catalogue(trainer.model, trainer.inputs, trainer.world)
    is_new = _drawn(dataset.user_ids.ids(np.arange(dataset.num_users)), seed)
    found = {
        name: _first_items(trainer, dataset, vectors, np.flatnonzero(is_new == wanted))
        for name, wanted in (("new", True), ("warm", False))
    }
    return {
        "new_user_recall_at_20": found["new"],
        "warm_user_recall_at_20": found["warm"],
        "new_user_recall_at_20_over_warm": found["new"] / found["warm"],
    }


def _first_items(
    trainer: Trainer, dataset: Dataset, vectors: NDArray[np.float32], users: NDArray[np.int64]
) -> float:
    """Return recall@20 of users by their first items, who have more than those."""
    rows = dataset.interactions
    by_time = np.lexsort((rows.time, rows.user_row))
    user_of, items = rows.user_row[by_time], rows.item_row[by_time].astype(np.int64)
    begin = np.searchsorted(user_of, users)
    end = np.searchsorted(user_of, users, side="right")
    asked = np.flatnonzero(end - begin > FIRST)
    known = np.stack([items[begin[u] : begin[u] + FIRST] for u in asked])
    relevant = [np.unique(items[begin[u] + FIRST : end[u]]) for u in asked]
    inputs = query_inputs(dataset, users[asked])
    # The latest first, as histories are; the request knows nothing of the user but these.
    history = known[:, ::-1].copy()
    features = QueryFeatures(dataset.schema, inputs.profiles)
    nobody = np.full(len(asked), -1)
    batch = features(nobody, inputs.columns, history, np.ones(history.shape, np.float32))
    queries = trainer.model.encode_queries(batch).numpy()
    offsets = np.arange(len(asked) + 1) * FIRST
    ranked = rank_block(queries, vectors, offsets, np.sort(known, axis=1).ravel(), 20)
    sums = MetricSums([20])
    sizes = np.cumsum([0, *map(len, relevant)])
    sums.add(ranked, sizes.astype(np.int64), np.concatenate(relevant))
    return sums.result()["recall@20"]


def _drawn(ids: list[str], seed: int) -> NDArray[np.bool_]:
    """Return which ids are new: one in ``SHARE``, by a hash of seed and id."""
    return np.array([hashlib.sha256(f"{seed}:{i}".encode()).digest()[0] % SHARE == 0 for i in ids])


def _held_out(
    base: Config, plain: Dataset, root: Path, test: NDArray[np.bool_], seed: int
) -> tuple[Config, Dataset]:
    """Return the same data with some interactions as its test split, and the configuration of it."""
    rows = plain.interactions
    root.mkdir()
    table = pa.table(
        {
            "user": plain.user_ids.ids(rows.user_row.astype(np.int64)),
            "item": plain.item_ids.ids(rows.item_row.astype(np.int64)),
            "time": pa.array(rows.time),
            "split": np.where(test, "test", "train"),
        }
    )
    pq.write_table(table, root / "interactions.parquet")
    pq.write_table(plain.item_table(), root / "items.parquet")
    values: dict[str, Any] = base.to_json()
    values["seed"] = seed
    values["storage"]["root"] = str(root)
    values["data"]["source"] = {
        "kind": "files",
        "interactions": str(root / "interactions.parquet"),
        "columns": {"user": "user", "item": "item", "time": "time", "time_unit": "us", "split": "split"},
        "items": {"path": str(root / "items.parquet"), "id": "item_id", "title": "title"},
    }
    values["data"]["positives"] = {}
    values["split"] = {"kind": "given", "validation_share": 0.1}
    config = parse_config(values)
    return config, prepare(config)


def _trained(config: Config, dataset: Dataset) -> Trainer:
    """Train in this process and keep the epoch that is best on validation."""
    trainer = Trainer(config, dataset, World(), "train")
    while trainer.epoch < config.train.epochs and not trainer.finished:
        trainer.run_epoch()
    trainer.model.load_state_dict(trainer.best_weights)
    trainer.model.eval()
    return trainer


if __name__ == "__main__":
    main()

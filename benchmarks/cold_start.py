"""New items by their features alone, new users by their first ten items, on ml-latest-small, three seeds.

    TWOTOWER_MIRROR=/data/movielens python -m benchmarks.cold_start [--quick]

``new_item_recall_at_100_over_random``: a tenth of the items, by a hash, comes after the training, which has
neither them nor their interactions. They are encoded by their features, users who had some of them are asked
for by what they had before the first of these, and all items are ranked. Random is 100 items out of all that
the user has not had.

``new_user_recall_at_20_over_warm``: of a tenth of the users, by a hash, the training has nothing, of another
tenth, the warm ones, the first ten items. These are the history of a request, all later ones the targets. So
no target was trained on; ``..._over_trained_on`` is over users whose every item was an example.

``only_new_recall_at_100`` is of requests whose history has nothing but new items, those that the user had
before the validation split, whose items are the targets; ``..._ignored`` is where they count for nothing.
``validation_...`` are of the training without the new items, of all users.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from dataclasses import dataclass
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
from twotower.evaluation.holdout import query_inputs
from twotower.evaluation.metrics import MetricSums
from twotower.evaluation.ranking import rank_block
from twotower.model.described import describe_items
from twotower.model.features import QueryFeatures, encode_columns, item_batch, profile_values
from twotower.model.unknown_items import DescribedItems
from twotower.schema import SPLITS
from twotower.training.collectives import World
from twotower.training.loop import Trainer
from twotower.training.validation import encode_catalogue

SHARE = 10
"""A share of 1 / SHARE of the items, or users, is new."""
_NEW, _WARM = 0, 1
"""Parts of the ids that are new, and that are warm users."""
FIRST = 10
"""Items of a new user that the request knows."""


def main() -> None:
    """Hold items out, then users; train and measure."""
    quick = measure.start("New items and new users, on ml-latest-small.", 1)
    extra = ["train.epochs=1"] if quick else []
    figures: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = load_config(BASE, [f"storage.root={root}", "train.num_workers=1", *extra])
        plain = prepare(base)
        for seed in SEEDS[:1] if quick else SEEDS:
            found = {**_new_items(base, plain, root, seed), **_new_users(base, plain, root, seed)}
            print({name: round(value, 4) for name, value in found.items()}, flush=True)
            for name, value in found.items():
                figures.setdefault(name, []).append(value)
    table: list[list[object]] = [["figure", "mean", "of each seed"]]
    table += [[n, f"{statistics.mean(v):.4f}", ", ".join(f"{x:.4f}" for x in v)] for n, v in figures.items()]
    measure.finish("cold_start", {n: statistics.mean(v) for n, v in figures.items()}, table, quick)


@dataclass(frozen=True)
class _Arrivals:
    """A training that did not know some items, the catalogue with them behind the others, and the log."""

    trainer: Trainer
    dataset: Dataset
    """Of the training."""
    vectors: NDArray[np.float32]
    """[N + A, D], of the N items of the training and the A that came later."""
    described: DescribedItems
    """The A items, as histories read them."""
    num_known: int
    """N."""
    user_row: NDArray[np.int64]
    """[n], the training's row of the user of each interaction; ascending, and by time inside a user."""
    item: NDArray[np.int64]
    """[n], place of its item in ``vectors``."""
    time: NDArray[np.int64]
    weight: NDArray[np.float32]

    @property
    def is_new(self) -> NDArray[np.bool_]:
        """[n] bool, interactions with an item that came later."""
        return self.item >= self.num_known

    def rows(self, user: int) -> NDArray[np.int64]:
        """Return the places of a user's interactions."""
        return np.arange(*np.searchsorted(self.user_row, [user, user + 1]))

    def queries(self, histories: list[NDArray[np.int64]], users: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the vectors of queries that know some interactions each, the latest first."""
        dataset = self.dataset
        length = max(dataset.schema.max_history, 1)
        rows = np.full((len(histories), length), -1)
        weights = np.zeros(rows.shape, np.float32)
        for query, found in enumerate(histories):
            latest = found[:length]
            rows[query, : len(latest)] = self.item[latest]
            weights[query, : len(latest)] = self.weight[latest]
        table = encode_columns(dataset.schema.query, dataset.user_table())
        columns = {name: column[users] for name, column in table.items()}
        items = encode_columns(dataset.schema.item, dataset.item_table())
        features = QueryFeatures(dataset.schema, profile_values(dataset.schema, items))
        batch = features(users, columns, rows, weights, described=self.described)
        return self.trainer.model.encode_queries(batch).numpy()


def _new_items(base: Config, plain: Dataset, root: Path, seed: int) -> dict[str, float]:
    """Return what becomes of items that came after the training, and of histories of nothing else."""
    arrived = _arrivals(base, plain, root / f"items-{seed}", seed)
    is_new, users, histories, had, relevant = arrived.is_new, [], [], [], []
    for user in np.unique(arrived.user_row[is_new]):
        rows = arrived.rows(user)
        first = arrived.time[rows[is_new[rows]]].min()
        before = rows[arrived.time[rows] < first]
        users.append(user)
        histories.append(before[::-1])
        had.append(np.unique(arrived.item[before]))
        relevant.append(np.setdiff1d(arrived.item[rows[is_new[rows]]], had[-1]))
    queries = arrived.queries(histories, np.array(users))
    recall = _recall(queries, arrived.vectors, had, relevant, 100)
    random = np.mean([100 / (len(arrived.vectors) - len(items)) for items in had])
    best = arrived.trainer.history[arrived.trainer.best_epoch - 1]
    assert best.validation_recall is not None
    assert best.validation_ndcg is not None
    read, ignored = _only_new(arrived)
    return {
        "new_item_recall_at_100": recall,
        "new_item_recall_at_100_over_random": recall / float(random),
        "only_new_recall_at_100": read,
        "only_new_recall_at_100_ignored": ignored,
        "validation_recall_at_100": best.validation_recall,
        "validation_ndcg_at_100": best.validation_ndcg,
    }


def _only_new(arrived: _Arrivals) -> tuple[float, float]:
    """Return recall@100 of the validation items by two new items or more before them, and by nothing."""
    log, users, histories, had, relevant = arrived.dataset.interactions, [], [], [], []
    for user in np.unique(arrived.user_row[arrived.is_new]):
        part = slice(int(log.user_offsets[user]), int(log.user_offsets[user + 1]))
        items, held = log.item_row[part].astype(np.int64), log.split[part] == SPLITS["validation"]
        wanted = np.setdiff1d(items[held], items[~held])
        if not len(wanted):
            continue
        rows = arrived.rows(user)
        before = rows[arrived.is_new[rows] & (arrived.time[rows] < log.time[part][held].min())]
        if len(before) >= 2:
            users.append(user)
            histories.append(before[::-1])
            had.append(np.union1d(items[~held], arrived.item[before]))
            relevant.append(wanted)
    nobody = np.full(len(users), -1)
    read, ignored = (
        _recall(arrived.queries(known, nobody), arrived.vectors, had, relevant, 100)
        for known in (histories, [h[:0] for h in histories])
    )
    return read, ignored


def _recall(
    queries: NDArray[np.float32],
    vectors: NDArray[np.float32],
    had: list[NDArray[np.int64]],
    relevant: list[NDArray[np.int64]],
    k: int,
) -> float:
    """Return recall@k of queries, each with the items left out of its list and those it is to find."""
    masked, sizes = np.cumsum([0, *map(len, had)]), np.cumsum([0, *map(len, relevant)])
    sums = MetricSums([k])
    ranked = rank_block(queries, vectors, masked, np.concatenate(had), k)
    sums.add(ranked, sizes, np.concatenate(relevant))
    return sums.result()[f"recall@{k}"]


def _arrivals(base: Config, plain: Dataset, root: Path, seed: int) -> _Arrivals:
    """Train without a tenth of the items, which are encoded afterwards."""
    new = _tenths(_ids(plain), seed) == _NEW
    log = plain.interactions
    config, dataset = _held_out(base, plain, root, new[log.item_row], seed, new)
    trainer = _trained(config, dataset)
    table = plain.item_table()
    columns = encode_columns(dataset.schema.item, table.filter(pa.array(new[: len(table)])))
    count = int(new[: len(table)].sum())
    batch = item_batch(dataset.schema, np.full(count, -1), columns)
    known = encode_catalogue(trainer.model, trainer.inputs, trainer.world)
    vectors = np.concatenate([known, trainer.model.encode_items(batch).numpy()])
    place = dataset.item_ids.rows(_ids(plain), "negative")
    place = np.where(new, len(known) + np.cumsum(new) - 1, place)
    users = dataset.user_ids.rows(plain.user_ids.ids(np.arange(plain.num_users)), "negative")
    mine = users[log.user_row] >= 0
    order = np.flatnonzero(mine)[np.argsort(users[log.user_row[mine]], kind="stable")]
    return _Arrivals(
        trainer,
        dataset,
        vectors,
        describe_items(trainer.model, columns, count),
        len(known),
        users[log.user_row[order]],
        place[log.item_row[order]],
        log.time[order],
        log.weight[order],
    )


def _ids(dataset: Dataset) -> list[str]:
    """Return the ids of all items."""
    return dataset.item_ids.ids(np.arange(dataset.num_items))


def _new_users(base: Config, plain: Dataset, root: Path, seed: int) -> dict[str, float]:
    """Return what is found for users of whom the training had nothing, their first items, or everything."""
    log = plain.interactions
    tenth = _tenths(plain.user_ids.ids(np.arange(plain.num_users)), seed)
    # Sorted by user and time.
    place = np.arange(len(log)) - log.user_offsets[log.user_row]
    held = (tenth == _NEW)[log.user_row] | ((tenth == _WARM)[log.user_row] & (place >= FIRST))
    config, dataset = _held_out(base, plain, root / f"users-{seed}", held, seed)
    trainer = _trained(config, dataset)
    vectors = encode_catalogue(trainer.model, trainer.inputs, trainer.world)
    tenth = _tenths(dataset.user_ids.ids(np.arange(dataset.num_users)), seed)
    new, warm, trained = (
        _first_items(trainer, dataset, vectors, np.flatnonzero(users))
        for users in (tenth == _NEW, tenth == _WARM, (tenth != _NEW) & (tenth != _WARM))
    )
    return {
        "new_user_recall_at_20": new,
        "warm_user_recall_at_20": warm,
        "trained_on_recall_at_20": trained,
        "new_user_recall_at_20_over_warm": new / warm,
        "new_user_recall_at_20_over_trained_on": new / trained,
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


def _tenths(ids: list[str], seed: int) -> NDArray[np.int64]:
    """Return which of ``SHARE`` parts each id is in, by a hash of seed and id."""
    return np.array([hashlib.sha256(f"{seed}:{i}".encode()).digest()[0] % SHARE for i in ids])


def _held_out(
    base: Config,
    plain: Dataset,
    root: Path,
    held: NDArray[np.bool_],
    seed: int,
    unknown: NDArray[np.bool_] | None = None,
) -> tuple[Config, Dataset]:
    """Return the data with some interactions as its test split, and the configuration of it.

    Args:
        base: configuration.
        plain: the data.
        root: folder of the new data.
        held: [n] bool, which interactions.
        seed: of the training.
        unknown: [items] bool, items that are left out altogether, with their interactions.
    """
    rows = plain.interactions
    root.mkdir()
    table = pa.table(
        {
            "user": plain.user_ids.ids(rows.user_row.astype(np.int64)),
            "item": plain.item_ids.ids(rows.item_row.astype(np.int64)),
            "time": pa.array(rows.time),
            "split": np.where(held, "test", "train"),
        }
    )
    items = plain.item_table()
    if unknown is not None:
        # A split must have a row; nobody asks for it.
        split = np.where(np.arange(len(held)) == np.flatnonzero(~held)[-1], "test", "train")
        table = table.set_column(3, "split", pa.array(split)).filter(pa.array(~held))
        items = items.filter(pa.array(~unknown[: len(items)]))
    pq.write_table(table, root / "interactions.parquet")
    pq.write_table(items, root / "items.parquet")
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

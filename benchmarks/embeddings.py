"""Sparse embedding updates: what a step costs when users grow from ten thousand to ten million.

Two towers of one linear layer over id embeddings, uniform ids. The figures without a suffix are those of
lazy_adam, the default, whose state is twice the table; those of rowwise_adagrad have its name behind them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import torch

from benchmarks import measure
from twotower.config import ModelConfig, TowerConfig
from twotower.model.batch import Bag
from twotower.model.features import QueryFeatures, item_batch
from twotower.model.losses import in_batch_softmax
from twotower.model.towers import TwoTower
from twotower.schema import FeatureSchema, FittedFeature, IdFeature
from twotower.training.collectives import World
from twotower.training.tables import TableKind, TableOptimizer, TouchedRows

THREADS = 1
DIM = 64
BATCH = 4096
ITEMS = 10_000
UPDATES = 10
"""Updates in one sample of their time: one alone takes too few milliseconds to be measured well."""


class Training:
    """A model of a number of users, its optimisers, and steps on random batches."""

    def __init__(self, users: int, kind: TableKind) -> None:
        """Make a fresh model."""
        tower = TowerConfig(hidden=[], norm="none", dropout=0.0)
        self.schema = FeatureSchema(
            query=[FittedFeature(spec=IdFeature(name="user_id", dim=DIM))],
            item=[FittedFeature(spec=IdFeature(name="item_id", dim=DIM))],
            num_users=users,
            num_items=ITEMS,
            num_catalogue_items=ITEMS,
        )
        config = ModelConfig(embedding_dim=DIM, query_tower=tower, item_tower=tower)
        self.model = TwoTower(self.schema, config, temperature=0.07, seed=0)
        self.weights = dict(self.model.tables.items())
        self.tables = TableOptimizer(self.weights, kind)
        self.dense = torch.optim.AdamW([*self.model.towers.parameters(), self.model.log_temperature])
        self.queries = QueryFeatures(self.schema, {})
        self.rng = np.random.default_rng(0)
        self.log_q = torch.full((BATCH,), -math.log(ITEMS))
        self.upstream = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(0)) / BATCH

    def step(self) -> None:
        """Train on one batch."""
        users, items = (self.rng.integers(n, size=BATCH) for n in (self.schema.num_users, ITEMS))
        none = np.zeros((BATCH, 0))
        queries = self.queries(users, {}, none, none)
        candidates = item_batch(self.schema, items, {})
        user_bag, item_bag = queries["user_id"], candidates["item_id"]
        assert isinstance(user_bag, Bag)
        assert isinstance(item_bag, Bag)
        touched = TouchedRows(self.weights, [("id_of_user", user_bag), ("id_of_item", item_bag)])
        towers = self.model.towers
        queries_QD = towers.query(self.model.inputs("query", queries, touched.lookup))
        candidates_CD = towers.item(self.model.inputs("item", candidates, touched.lookup))
        loss = in_batch_softmax(
            queries_QD,
            candidates_CD,
            torch.arange(BATCH),
            self.model.log_temperature.exp(),
            self.log_q,
            torch.from_numpy(items),
            torch.full((BATCH,), 1 / BATCH),
            mask_accidental_hits=True,
        )
        self.dense.zero_grad()
        loss.backward()
        self.dense.step()
        self.tables.step(touched.gradients(World()), learning_rate=1e-3)

    def update(self) -> int:
        """Look up random users, take a gradient as given and update; return the number of touched rows."""
        ids = torch.from_numpy(self.rng.integers(self.schema.num_users, size=(BATCH, 1)) + 1)
        bag = Bag(ids, torch.ones(BATCH, 1))
        touched = TouchedRows(self.weights, [("id_of_user", bag)])
        touched.lookup("id_of_user", bag).backward(self.upstream)
        gradients = touched.gradients(World())
        self.tables.step(gradients, learning_rate=1e-3)
        return len(gradients["id_of_user"][0])

    def updates(self) -> None:
        """Update ``UPDATES`` times."""
        for _ in range(UPDATES):
            self.update()


def one_update(users: int, kind: TableKind) -> Callable[[], object]:
    """Return one update of a large table; what a first update ever needs has been loaded with a small one."""
    Training(100, kind).update()
    return Training(users, kind).update


def measured(kind: TableKind, quick: bool) -> tuple[dict[str, float], list[tuple[object, ...]]]:
    """Return the figures of a table optimiser, and the rows of the table that go with them."""
    sizes = {"10k": 10_000, "1m": 100_000, "10m": 1_000_000} if quick else {}
    sizes = sizes or {"10k": 10_000, "1m": 1_000_000, "10m": 10_000_000}
    trainings = {name: Training(users, kind) for name, users in sizes.items()}
    steps = measure.times({name: t.step for name, t in trainings.items()}, 3 if quick else 31, warmup=2)
    updates = measure.times({name: t.updates for name, t in trainings.items()}, 3 if quick else 31, warmup=2)
    touched = trainings["10m"].update()
    # The tables of ten million rows are freed before the process of the next measurement makes its own.
    del trainings
    gc.collect()
    extra = measure.peak_extra_bytes(
        "benchmarks.embeddings:one_update", {"users": sizes["10m"], "kind": kind}, THREADS
    )
    extra_over_touched = extra / (touched * DIM * torch.float32.itemsize)
    figures = {
        "step_1m_over_10k": steps["1m"].over(steps["10k"]),
        "step_10m_over_10k": steps["10m"].over(steps["10k"]),
        "update_10m_over_10k": updates["10m"].over(updates["10k"]),
        "update_extra_over_touched": extra_over_touched,
    }
    rows: list[tuple[object, ...]] = [
        (kind, f"{users:,}", steps[name], updates[name], "") for name, users in sizes.items()
    ]
    rows[-1] = (*rows[-1][:-1], f"{extra_over_touched:.1f} x touched rows")
    return figures, rows


def main() -> None:
    """Measure both table optimisers."""
    quick = measure.start("Sparse embedding updates against the size of the user table.", THREADS)
    figures: dict[str, float] = {}
    table: list[tuple[object, ...]] = [
        ("optimiser", "users", "step", f"{UPDATES} updates", "extra memory of an update")
    ]
    for kind in get_args(TableKind):
        found, rows = measured(kind, quick)
        suffix = "" if kind == "lazy_adam" else f"_{kind}"
        figures |= {name + suffix: value for name, value in found.items()}
        table += rows
    measure.finish("embeddings", figures, table, quick)


if __name__ == "__main__":
    main()

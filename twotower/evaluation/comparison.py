"""Rankers side by side: the same users, the same candidates, the same masked items, the same metrics.

A ranker turns a range of test users into lists [Q, k] int64, -1 padded, without their masked items. What is
measured of a range merges with the measurements of other ranges, so that ranges can be ranked anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.data.knowledge import Holdout
from twotower.errors import ArtefactError
from twotower.evaluation.holdout import QueryInputs
from twotower.evaluation.lists import TOP_LIST_LENGTH, ItemFacts, ListStats, Overlap
from twotower.evaluation.matrix import open_matrix, write_matrix
from twotower.evaluation.metrics import MetricSums, hit_matrix
from twotower.evaluation.portrait import Found
from twotower.evaluation.ranking import rank_block
from twotower.model.batch import to_device
from twotower.model.checkpoint import Checkpoint
from twotower.model.features import QueryFeatures

Ints = NDArray[np.int64]
Values = NDArray[np.float32]


class Ranker(Protocol):
    """Ranks the catalogue for users of a holdout."""

    def __call__(self, start: int, part: Holdout, k: int) -> Ints:
        """Return [Q, k] int64 for ``part``, which begins at user ``start`` of the whole holdout."""
        ...


class ModelRanker:
    """Ranks by the dot product of the query tower's output with all item vectors."""

    def __init__(self, checkpoint: Checkpoint, inputs: QueryInputs, vectors: NDArray[np.float32]) -> None:
        """Take the model, the query inputs of all test users, and item vectors [N, D] float32."""
        self._name = checkpoint.path
        self._model = checkpoint.model
        self._length = checkpoint.schema.max_history
        self._inputs = inputs
        self._features = QueryFeatures(checkpoint.schema, inputs.profiles)
        self._vectors = vectors
        self._device = next(checkpoint.model.parameters()).device

    def __call__(self, start: int, part: Holdout, k: int) -> Ints:
        """Return [Q, k] int64."""
        stop = start + len(part)
        users, histories = np.arange(start, stop), self._inputs.histories
        rows, weights = histories.before(users, None, self._length)
        times = histories.times_before(users, None, self._length) if self._features.schema.time_gaps else None
        columns = {name: np.asarray(column[start:stop]) for name, column in self._inputs.columns.items()}
        batch = to_device(self._features(part.user_rows, columns, rows, weights, times), self._device)
        queries = self._model.encode_queries(batch)
        if not bool(torch.isfinite(queries).all()):
            raise ArtefactError(
                f"the query tower of checkpoint {self._name} gives vectors that are not finite: its training "
                "diverged. Train again, with a lower learning rate or a higher temperature"
            )
        return rank_block(queries, self._vectors, part.masked_offsets, part.masked_rows, k)


@dataclass(frozen=True)
class Measure:
    """What is measured of every ranker's lists."""

    ks: list[int]
    """Cut-offs, ascending."""
    facts: ItemFacts
    """Of the catalogue."""
    item_slices: NDArray[np.bool_]
    """[V, N] bool: members of each slice of items."""

    @property
    def num_items(self) -> int:
        """Catalogue items N."""
        return len(self.facts.counts)

    def write(self, folder: Path) -> None:
        """Write it as arrays that workers can memory-map."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "ks.npy", np.array(self.ks, dtype=np.int64))
        np.save(folder / "counts.npy", self.facts.counts)
        np.save(folder / "num_users.npy", np.array(self.facts.num_users, dtype=np.int64))
        np.save(folder / "item_slices.npy", self.item_slices)
        if self.facts.attributes is not None:
            write_matrix(folder / "attributes", self.facts.attributes)

    @classmethod
    def open(cls, folder: Path) -> Measure:
        """Return what ``write`` wrote, memory-mapped."""
        attributes = folder / "attributes"
        facts = ItemFacts(
            np.load(folder / "counts.npy", mmap_mode="r"),
            int(np.load(folder / "num_users.npy")),
            open_matrix(attributes) if attributes.is_dir() else None,
        )
        slices = np.load(folder / "item_slices.npy", mmap_mode="r")
        return cls(np.load(folder / "ks.npy").tolist(), facts, slices)


class Outcome:
    """What is measured of one ranker's lists."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self.sums = MetricSums(measure.ks)
        self.lists = ListStats(measure.num_items, measure.ks, measure.facts)
        self.slices = [MetricSums(measure.ks) for _ in measure.item_slices]
        self.found = Found(max(measure.ks))

    def add(self, ranked: Ints, part: Holdout) -> Values:
        """Add the lists [Q, K] int64 of the users of ``part``; K is at least the largest cut-off.

        Returns:
            [Q, C] float32, the metrics of each user in the order of ``metric_names``.
        """
        hits, num_relevant = hit_matrix(ranked, part.relevant_offsets, part.relevant_rows)
        values = self.sums.add_hits(hits, num_relevant)
        self.found.add(hits, num_relevant)
        self.lists.add(ranked)
        owner = np.repeat(np.arange(len(part)), np.diff(part.relevant_offsets))
        for members, sums in zip(self._measure.item_slices, self.slices, strict=True):
            theirs = np.bincount(owner, members[part.relevant_rows], len(part)).astype(np.int64)
            some = theirs > 0
            sums.add_hits(hits[some] & members[ranked[some]], theirs[some])
        return values.reshape(len(part), -1).astype(np.float32)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what ``merge`` takes."""
        slices = np.array([sums.state() for sums in self.slices])
        own = {"sums": self.sums.state(), "found": self.found.state(), "slices": slices}
        return {**own, **self.lists.state()}

    def merge(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the outcome of other users."""
        self.sums.merge(state["sums"])
        self.found.merge(state["found"])
        for sums, numbers in zip(self.slices, state["slices"], strict=True):
            sums.merge(numbers)
        self.lists.merge(state)

    def result(self) -> dict[str, float]:
        """Return metrics by name, such as ``recall@10``, ``coverage@10`` and ``same_top10``."""
        return self.sums.result() | self.lists.result()


@dataclass(frozen=True)
class Measured:
    """What rankers came to on a range of users."""

    outcomes: dict[str, Outcome]
    values: dict[str, Values]
    """By ranker, [Q, C] float32: the metrics of each user."""
    overlap: Overlap
    """Of what the first ranker gives some of the users before anything is masked."""


def compare(
    rankers: Mapping[str, Ranker], held: Holdout, start: int, stop: int, measure: Measure, probes: int = 0
) -> Measured:
    """Return what each ranker comes to on users ``start`` to ``stop`` of a holdout.

    Args:
        rankers: by name.
        held: the holdout.
        start: its first user that is ranked for.
        stop: the user behind the last one.
        measure: what is measured.
        probes: users for whom the first ranker ranks without masks too.
    """
    part = held.part(start, stop)
    outcomes = {name: Outcome(measure) for name in rankers}
    values = {
        name: outcomes[name].add(ranker(start, part, max(measure.ks)), part)
        for name, ranker in rankers.items()
    }
    overlap = Overlap(measure.num_items)
    if probes:
        few = unmasked(held.part(start, min(start + probes, stop)))
        overlap.add(next(iter(rankers.values()))(start, few, TOP_LIST_LENGTH))
    return Measured(outcomes, values, overlap)


def unmasked(part: Holdout) -> Holdout:
    """Return the same queries with nothing masked."""
    none = np.empty(0, dtype=np.int64)
    return replace(part, masked_offsets=np.zeros(len(part) + 1, dtype=np.int64), masked_rows=none)

"""Rankers side by side: the same users, the same candidates, the same masked items, the same metrics.

A ranker turns a range of test users into lists [Q, k] int64, -1 padded, without their masked items. What is
measured of a range merges with the measurements of other ranges, so that ranges can be ranked anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.data.knowledge import Holdout
from twotower.errors import ArtefactError
from twotower.evaluation.holdout import QueryInputs
from twotower.evaluation.metrics import ListStats, MetricSums
from twotower.evaluation.ranking import rank_block
from twotower.model.batch import to_device
from twotower.model.checkpoint import Checkpoint
from twotower.model.features import QueryFeatures

Ints = NDArray[np.int64]


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


class Outcome:
    """What is measured of one ranker's lists.

    Args:
        num_items: catalogue items N.
        ks: cut-offs.
    """

    def __init__(self, num_items: int, ks: Sequence[int]) -> None:
        self.sums = MetricSums(ks)
        self.lists = ListStats(num_items, ks)

    def add(self, ranked: Ints, part: Holdout) -> None:
        """Add the lists [Q, K] int64 of the users of ``part``."""
        self.sums.add(ranked, part.relevant_offsets, part.relevant_rows)
        self.lists.add(ranked)

    def state(self) -> dict[str, bytes]:
        """Return what ``merge`` takes."""
        return {"sums": self.sums.state().tobytes(), **self.lists.state()}

    def merge(self, state: Mapping[str, bytes]) -> None:
        """Add the outcome of other users."""
        self.sums.merge(np.frombuffer(state["sums"]))
        self.lists.merge({name: value for name, value in state.items() if name != "sums"})

    def result(self) -> dict[str, float]:
        """Return metrics by name, such as ``recall@10``, ``coverage@10`` and ``same_top10``."""
        return self.sums.result() | self.lists.result()


def compare(
    rankers: Mapping[str, Ranker], held: Holdout, start: int, stop: int, num_items: int, ks: Sequence[int]
) -> dict[str, Outcome]:
    """Return the outcome of each ranker on users ``start`` to ``stop`` of a holdout."""
    part = held.part(start, stop)
    outcomes = {name: Outcome(num_items, ks) for name in rankers}
    for name, ranker in rankers.items():
        outcomes[name].add(ranker(start, part, max(ks)), part)
    return outcomes

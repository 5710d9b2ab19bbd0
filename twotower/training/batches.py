"""Global batches cut into the ranks' shares, and all that a step needs of one on the host.

A share knows the items and users of the whole global batch, so that candidates, masks and logQ can be made
without asking other ranks. The last batch of an epoch is padded to equal shares; padding is row -1.

Shapes: W world size, b rows of a rank's share, B = W b, M drawn candidates of all ranks, m = M / W of a rank,
H own negatives of a query, C = W (b + m) + K candidates with K in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.data.interactions import Interactions
from twotower.training.collectives import World
from twotower.training.examples import Examples

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """A rank's part of a global batch."""

    examples: Examples
    """What ``rows`` are numbers of."""
    rows: IntArray
    """[b] int64, -1 padding."""
    item_rows: IntArray
    """[W, b] int64, the positives of all ranks, -1 padding."""
    user_rows: IntArray
    """[W, b] int64, the users of all ranks, -1 padding."""
    user_counts: IntArray
    """[W, b] int64, how many examples each of these users has."""
    weights: npt.NDArray[np.float64]
    """[W, b] float64, what each of these examples weighs in the loss, 0 for padding."""

    @property
    def size(self) -> int:
        """Examples of the global batch, padding left out."""
        return int((self.item_rows >= 0).sum())

    def loss_weights(self, rank: int) -> npt.NDArray[np.float32]:
        """Return the share of each example of a rank in the weight of the global batch, [b] float32.

        In double precision until the end: equal weights give 1 / ``size`` to the bit, however small they are.
        """
        return (self.weights[rank] / self.weights.sum()).astype(np.float32)


class MemorySource:
    """Batches of examples that every rank holds: an exact shuffle over all of them in each epoch."""

    def __init__(
        self, examples: Examples, interactions: Interactions, batch: int, world: World, seed: int
    ) -> None:
        """Cut epochs into global batches of ``batch`` rows, the last one shorter."""
        self.examples = examples
        self._interactions = interactions
        self._batch = batch
        self._world = world
        self._seed = seed
        self.steps_per_epoch = math.ceil(len(examples) / batch)

        self.rows_per_epoch = len(examples)

    def item_counts(self) -> IntArray:
        """Return how often each catalogue item is a positive in an epoch, [num_catalogue_items] int64."""
        return self.examples.item_counts()

    @property
    def order_key(self) -> str:
        """What an epoch's order depends on beside the seed: nothing, on any number of workers."""
        return "memory"

    def blocks(self) -> Iterable[Interactions]:
        """Yield all interactions, of every split, in one block."""
        yield self._interactions

    def order(self, epoch: int) -> IntArray:
        """Return the permutation of an epoch (from 0), the same on every rank, [n] int64."""
        return self.examples.shuffled(np.random.default_rng([self._seed, 2, epoch]))

    def shares(self, epoch: int, first_step: int = 0) -> Iterator[Share]:
        """Yield this rank's shares of an epoch (from 0), from a step of it (from 0) on."""
        order = self.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            rows = order[step * self._batch : (step + 1) * self._batch]
            each = -(-len(rows) // self._world.size)
            padded = np.full(each * self._world.size, -1, np.int64)
            padded[: len(rows)] = rows
            shape = (self._world.size, each)
            yield Share(
                self.examples,
                padded.reshape(shape)[self._world.rank],
                self.examples.item_rows(padded).reshape(shape),
                self.examples.user_rows(padded).reshape(shape),
                self.examples.user_counts(padded).reshape(shape),
                self.examples.weights(padded).reshape(shape),
            )

"""Batches of interactions that are not all in memory: blocks of users read in a new order each epoch.

The blocks of an epoch are permuted, and the stream of their examples is cut into one stretch for each rank,
equal to within one example; where a cut falls inside a block, two ranks read it and each trains on its part.
A rank reads its stretch pool by pool, permutes the examples of each and cuts them into shares. What is left
over of a pool begins the next one, along with the users that it is of. So an epoch has as many steps as one
in memory, all full but the last, every example is in it once, and a share's users are complete.

Everything is a function of seed, epoch and world size, and the pools follow from the index of blocks alone:
a restarted run reads on at the pool that holds its next share.

Shapes: as in ``batches``; n rows of a pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from twotower.config import Config
from twotower.data.blocks import Block, BlockIndex, Columns, is_example, whole_users
from twotower.data.dataset import Dataset
from twotower.data.interactions import COLUMNS, Interactions
from twotower.errors import TrainingError
from twotower.training.batches import Share
from twotower.training.collectives import World
from twotower.training.examples import Examples, Fit, TowerInputs, fitted_part, last_split, no_examples
from twotower.training.weights import Factors

IntArray = npt.NDArray[np.int64]
ReadBlocks = Callable[[list[Block]], Iterator[Interactions]]
"""Yields the interactions of blocks in the order given."""

_LARGEST_BLOCK = 1 << 17
_BLOCKS_OF_BUFFER = 16
# Streams of random numbers: of the order of blocks, and of the order inside a pool.
_BLOCK_ORDER, _POOL_ORDER = 4, 5


@dataclass(frozen=True)
class Piece:
    """Examples [first, last) of a block."""

    block: Block
    first: int
    last: int


class StreamSource:
    """Batches of examples of which each rank holds a buffer."""

    def __init__(
        self,
        dataset: Dataset,
        inputs: TowerInputs,
        config: Config,
        world: World,
        fit: Fit,
        read_blocks: ReadBlocks,
    ) -> None:
        """Index the dataset's interactions.

        Collective: all ranks.

        Args:
            dataset: prepared; its interactions are not loaded.
            inputs: of the dataset.
            config: batch, buffer and seed.
            world: this process's place.
            fit: the split that is trained on.
            read_blocks: reads blocks of the dataset's file of interactions.

        Raises:
            TrainingError: there is no example, or hard negatives are mined, which needs all examples.
        """
        if config.train.negatives.mined.per_query:
            raise TrainingError(
                f"train.negatives.mined.per_query ({config.train.negatives.mined.per_query}) needs all "
                "examples in memory, and this training streams them; use train.ingest: memory, or 0"
            )
        self._path = dataset.path / "interactions.parquet"
        self._inputs = inputs
        self._world = world
        self._fit = fit
        self._read_blocks = read_blocks
        self._seed = config.seed
        self._share_rows = config.train.batch_size(dataset.train_positives) // world.size
        self._with_explicit = config.train.negatives.explicit > 0
        self._weighted = config.train.loss.weights == "interaction"
        self._factors = Factors.of(config.train.loss, dataset)
        self._buffer_rows = config.train.stream_buffer_rows
        block_rows = min(max(self._buffer_rows // _BLOCKS_OF_BUFFER, 1), _LARGEST_BLOCK)
        self.index = BlockIndex.scan(
            self._path, block_rows, inputs.num_catalogue_items, last_split(fit), self._weighted
        )
        self.rows_per_epoch = self.index.num_examples
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / (self._share_rows * world.size))
        if self.rows_per_epoch == 0:
            raise no_examples(dataset, fit, self._weighted)
        # A thread may make shares ahead while steps run: what it gathers must not mix with their collectives.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None

    @property
    def order_key(self) -> str:
        """What the order of an epoch depends on beside the dataset, the seed and the batch, as words."""
        return f"a stream of {self._world.size} workers with buffers of {self._buffer_rows:,} rows"

    def item_counts(self) -> IntArray:
        """Return how often each catalogue item is a positive in an epoch, [num_catalogue_items] int64."""
        return self.index.item_counts

    def blocks(self) -> Iterator[Interactions]:
        """Yield all interactions, of every split, in blocks that part no user; offsets know no users."""
        for columns in whole_users(self._path):
            yield Interactions.of(0, **columns)

    def pools(self, epoch: int) -> list[list[Piece]]:
        """Return what this rank reads in an epoch (from 0), pool by pool.

        The new rows of a pool are at most half of the buffer, or one block; the other half is for the users
        whose examples an incomplete share carries over.
        """
        rank, size = self._world.rank, self._world.size
        begin, end = (r * self.rows_per_epoch // size for r in (rank, rank + 1))
        order = np.random.default_rng([self._seed, _BLOCK_ORDER, epoch]).permutation(len(self.index.blocks))
        pools: list[list[Piece]] = []
        before = rows = 0
        for number in order:
            block = self.index.blocks[number]
            first, last = (min(max(x - before, 0), block.num_examples) for x in (begin, end))
            before += block.num_examples
            if first == last:
                continue
            if not pools or rows + len(block) > self._buffer_rows // 2:
                pools.append([])
                rows = 0
            pools[-1].append(Piece(block, first, last))
            rows += len(block)
        return pools

    def shares(self, epoch: int, first_step: int = 0) -> Iterator[Share]:
        """Yield this rank's shares of an epoch (from 0), from a step of it (from 0) on.

        Collective: all ranks, at each share.
        """
        pools, b = self.pools(epoch), self._share_rows
        counts = [sum(piece.last - piece.first for piece in pool) for pool in pools]
        padding = -(-self.rows_per_epoch // self._world.size) - sum(counts)
        skipped = first_step * b
        # Where this rank has nothing but padding left, its last pool provides the share.
        first_pool = min(int(np.searchsorted(np.cumsum(counts), skipped, side="right")), len(pools) - 1)
        skipped -= sum(counts[:first_pool])
        read = self._read_blocks([piece.block for pool in pools[first_pool:] for piece in pool])
        carried = _Carried.nothing()
        for number in range(first_pool, len(pools)):
            random = np.random.default_rng([self._seed, _POOL_ORDER, epoch, number, self._world.rank])
            columns, wanted = self._fill(carried, pools[number], read)
            examples = Examples(
                self._inputs, *_renumbered(columns), self._with_explicit, self._weighted, self._factors
            )
            order = np.concatenate([carried.order, examples.shuffled(random, wanted)])
            if number == first_pool:
                order = order[skipped:]
            if number == len(pools) - 1:
                order = np.concatenate([order, np.full(padding, -1)])
            else:
                full = len(order) - len(order) % b
                carried = self._carry(columns, order[full:])
                order = order[:full]
            del columns  # the examples have what they need of them
            for start in range(0, len(order), b):
                yield self._share(examples, order[start : start + b])

    def _fill(
        self, carried: _Carried, pieces: list[Piece], read: Iterator[Interactions]
    ) -> tuple[Columns, IntArray]:
        """Return the rows of a pool and the numbers of its examples that it adds to those carried over."""
        parts, wanted = [carried.columns], []
        num_examples = carried.num_examples
        for piece in pieces:
            parts.append(fitted_part(next(read), self._fit).columns())
            wanted.append(np.arange(num_examples + piece.first, num_examples + piece.last))
            num_examples += piece.block.num_examples
        columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
        found = int(self._is_example(columns).sum())
        assert found == num_examples, f"{found} examples were read where the index has {num_examples}"
        return columns, np.concatenate(wanted)

    def _share(self, examples: Examples, rows: IntArray) -> Share:
        numbers = (examples.item_rows(rows), examples.user_rows(rows), examples.user_counts(rows))
        # The bits of the weights, so that one collective takes all.
        mine = np.stack([*numbers, examples.weights(rows).view(np.int64)])
        everyone = [torch.from_numpy(mine)]
        if self._group is not None:
            everyone = [torch.empty(mine.shape, dtype=torch.int64) for _ in range(self._world.size)]
            dist.all_gather(everyone, torch.from_numpy(mine), group=self._group)
        item_rows, user_rows, user_counts, bits = torch.stack(everyone, dim=1).numpy()
        return Share(examples, rows, item_rows, user_rows, user_counts, bits.view(np.float64))

    def _is_example(self, columns: Columns) -> npt.NDArray[np.bool_]:
        return is_example(columns, self._inputs.num_catalogue_items, self._weighted)

    def _carry(self, columns: Columns, left: IntArray) -> _Carried:
        """Return what is carried on of a pool of which the examples ``left`` (numbers) are left over."""
        example_rows = np.flatnonzero(self._is_example(columns))
        kept = np.isin(columns["user_row"], columns["user_row"][example_rows[left]])
        numbers = np.flatnonzero(kept[example_rows])
        rows = {name: column[kept] for name, column in columns.items()}
        return _Carried(rows, len(numbers), np.searchsorted(numbers, left))


@dataclass(frozen=True)
class _Carried:
    """What a pool leaves to the next one."""

    columns: Columns
    """All rows of the users of the examples left over."""
    num_examples: int
    """Examples among these rows."""
    order: IntArray
    """Numbers among those of the examples left over, in the order of training."""

    @classmethod
    def nothing(cls) -> _Carried:
        return cls({name: np.empty(0, kind) for name, kind in COLUMNS.items()}, 0, np.empty(0, np.int64))


def _renumbered(columns: Columns) -> tuple[Interactions, IntArray]:
    """Return a pool's interactions with its users numbered from 0, and the user row [U] int64 of each.

    The examples of these interactions have the numbers of ``columns``' rows that are examples, in order.
    """
    user_row = columns["user_row"]
    begins = np.concatenate([[True], user_row[1:] != user_row[:-1]])
    numbered = columns | {"user_row": (np.cumsum(begins) - 1).astype(np.int32)}
    return Interactions.of(int(begins.sum()), **numbered), user_row[begins].astype(np.int64)

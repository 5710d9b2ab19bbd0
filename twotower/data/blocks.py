"""The interactions of a dataset block by block, for what does not fit in memory.

A block is a range of rows of the file of interactions that holds all rows of its users. Nothing here holds
more than a row group and the rows of one user.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.interactions import COLUMNS, Interactions, user_blocks
from twotower.schema import KINDS

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Block:
    """Rows [start, end) of the file of interactions: all rows of some users."""

    start: int
    end: int
    num_examples: int
    """Examples among them, in the split that was asked for."""

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class BlockIndex:
    """The blocks of a file in its order, and what is counted on the way."""

    blocks: list[Block]
    item_counts: npt.NDArray[np.int64]
    """[num_catalogue_items] int64, examples of each catalogue item."""

    @property
    def num_examples(self) -> int:
        """Examples of all blocks."""
        return sum(block.num_examples for block in self.blocks)

    @classmethod
    def scan(
        cls, path: Path, block_rows: int, num_catalogue_items: int, last_split: int, weighted: bool = True
    ) -> BlockIndex:
        """Cut a file of interactions into blocks and count, in one pass over the columns that this needs.

        Args:
            path: what ``Interactions.write`` wrote.
            block_rows: the most rows of a block; one user with more rows is a block of its own.
            num_catalogue_items: examples are of item rows below it.
            last_split: a code of ``schema.SPLITS``; examples are of it and of those before it.
            weighted: as for ``is_example``.
        """
        blocks: list[Block] = []
        item_counts = np.zeros(num_catalogue_items, np.int64)
        start = 0
        for columns in whole_users(path, ["user_row", "item_row", "weight", "kind", "split"]):
            example = is_example(columns, num_catalogue_items, weighted)
            example &= columns["split"] <= last_split
            item_counts += np.bincount(columns["item_row"][example], minlength=num_catalogue_items)
            before = np.concatenate([[0], np.cumsum(example)])
            for part in user_blocks(columns["user_row"], block_rows):
                num_examples = int(before[part.stop] - before[part.start])
                blocks.append(Block(start + part.start, start + part.stop, num_examples))
            start += len(example)
        return cls(blocks, item_counts)


def is_example(columns: Columns, num_catalogue_items: int, weighted: bool = True) -> npt.NDArray[np.bool_]:
    """Return which rows are examples of training: positive interactions with a catalogue item, [n] bool.

    Args:
        columns: item_row, kind and weight [n].
        num_catalogue_items: items of other rows are no examples.
        weighted: what weighs nothing is no example; otherwise weights are not looked at.
    """
    found: npt.NDArray[np.bool_] = (columns["kind"] == KINDS["positive"]) & (
        columns["item_row"] < num_catalogue_items
    )
    return found & (columns["weight"] > 0) if weighted else found


def whole_users(path: Path, names: Sequence[str] = tuple(COLUMNS)) -> Iterator[Columns]:
    """Yield columns of a file of interactions in its order, about a row group at a time, parting no user.

    Args:
        path: what ``Interactions.write`` wrote.
        names: columns wanted, ``user_row`` among them.
    """
    rest: Columns = {name: np.empty(0, COLUMNS[name]) for name in names}
    with pq.ParquetFile(path) as file:
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, columns=list(names))
            both = {n: np.concatenate([rest[n], table.column(n).to_numpy()]) for n in names}
            # The last user may go on in the next row group.
            last = int(np.searchsorted(both["user_row"], both["user_row"][-1]))
            rest = {name: column[last:] for name, column in both.items()}
            if last:
                yield {name: column[:last] for name, column in both.items()}
    if len(rest["user_row"]):
        yield rest


def read_table(path: Path, start: int, end: int) -> pa.Table:
    """Return rows [start, end) of a file of interactions; only the row groups that hold them are read."""
    parts = []
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            begin, stop = max(start - first, 0), min(end - first, rows)
            if begin < stop:
                table = file.read_row_group(group, columns=list(COLUMNS))
                parts.append(table.slice(begin, stop - begin))
            first += rows
    return pa.concat_tables(parts)


def block_of(table: pa.Table) -> Interactions:
    """Return a block's rows as interactions.

    Their offsets know no users: for each block they would be as long as the user table.
    """
    return Interactions.of(0, **{name: table.column(name).to_numpy() for name in COLUMNS})


def read_blocks(path: Path, blocks: Sequence[Block]) -> Iterator[Interactions]:
    """Yield the interactions of some blocks of a file, one after the other, as ``block_of`` makes them."""
    for block in blocks:
        yield block_of(read_table(path, block.start, block.end))

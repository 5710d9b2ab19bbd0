"""Vectors between encoding and indexing: parts, written by many, each accounted for once.

A part is three files, vectors, rows of each shard and item rows, sorted by shard and then item row. The item
rows are written last: a part counts once they are there, and its name says what it holds, so that a build
that was killed goes on with the parts that are missing.

Symbols: D embedding_dim, N catalogue items, S shards, n rows of a part.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.errors import ArtefactError

_KINDS = ("vectors", "shards", "rows")


@dataclass(frozen=True)
class Part:
    """What was written by one call of an encoder."""

    path: str
    """Path without the endings ``.vectors.npy`` (float32 [n, D]) and ``.rows.npy`` (int64 [n])."""
    shard_rows: list[int]
    """[S] rows of each shard, which lie one after the other."""

    @classmethod
    def open(cls, path: Path) -> Part | None:
        """Return the part of a path without its endings; None when it was not written whole."""
        if not Path(f"{path}.rows.npy").is_file():
            return None
        return cls(str(path), _open(f"{path}.shards.npy").tolist())

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(self.shard_rows)

    def vectors(self) -> npt.NDArray[np.float32]:
        """The vectors, memory-mapped [n, D]."""
        return _open(f"{self.path}.vectors.npy")

    def item_rows(self) -> npt.NDArray[np.int64]:
        """The item row of each vector, memory-mapped [n]."""
        return _open(f"{self.path}.rows.npy")

    def shard(self, number: int) -> slice:
        """The rows of one shard."""
        start = sum(self.shard_rows[:number])
        return slice(start, start + self.shard_rows[number])


def write_part(
    directory: Path,
    item_rows: npt.NDArray[np.int64],
    shards: npt.NDArray[np.int32],
    vectors: npt.NDArray[np.float32],
    num_shards: int,
    name: str | None = None,
) -> Part:
    """Write one part, flushed to disk.

    Args:
        directory: where parts are collected; must be there.
        item_rows: [n].
        shards: [n] in [0, num_shards).
        vectors: [n, D].
        num_shards: S.
        name: of the part; one of its own when not given.
    """
    order = np.lexsort((item_rows, shards))
    path = directory / (name or uuid.uuid4().hex)
    counts = np.bincount(shards, minlength=num_shards)
    save_array(Path(f"{path}.vectors.npy"), np.asarray(vectors[order], dtype=np.float32))
    save_array(Path(f"{path}.shards.npy"), counts)
    save_array(Path(f"{path}.rows.npy"), np.asarray(item_rows[order], dtype=np.int64))
    return Part(str(path), counts.tolist())


def check_parts(parts: Sequence[Part], num_items: int, held: npt.NDArray[np.bool_] | None = None) -> None:
    """Refuse parts that do not hold every item row exactly once.

    Args:
        parts: of the whole catalogue.
        num_items: N.
        held: [R] whether there is an item of each row; rows 0 to N - 1 when not given.

    Raises:
        ArtefactError: with an item row that is missing, repeated or out of range.
    """
    held = np.ones(num_items, np.bool_) if held is None else held
    seen = np.zeros(len(held), np.bool_)
    for part in parts:
        rows = part.item_rows()
        if len(rows) != part.num_rows or len(part.vectors()) != part.num_rows:
            raise ArtefactError(f"{part.path} holds {len(rows)} rows, not {part.num_rows}; encode again")
        if len(rows) and (rows.min() < 0 or rows.max() >= len(held)):
            wrong = rows[(rows < 0) | (rows >= len(held))][0]
            raise ArtefactError(f"item row {wrong} was encoded; the catalogue has rows 0 to {len(held) - 1}")
        if not held[rows].all():
            wrong = rows[~held[rows]][0]
            raise ArtefactError(f"item row {wrong} was encoded; the catalogue has no such item")
        if seen[rows].any() or len(np.unique(rows)) != len(rows):
            ordered = np.sort(rows)
            repeated = np.concatenate([rows[seen[rows]], ordered[1:][ordered[1:] == ordered[:-1]]])
            raise ArtefactError(f"item row {repeated[0]} was encoded twice; prepare the dataset again")
        seen[rows] = True
    if missing := int((held & ~seen).sum()):
        raise ArtefactError(
            f"{missing} of {int(held.sum())} items were not encoded, the first is item row "
            f"{int(np.argmax(held & ~seen))}; encode again"
        )


def remove_strays(directory: Path, parts: Sequence[Part]) -> int:
    """Remove the files of attempts that failed, and of other parts; returns how many there were."""
    named = {f"{Path(p.path).name}.{kind}.npy" for p in parts for kind in _KINDS}
    strays = [path for path in directory.iterdir() if path.name not in named]
    for path in strays:
        path.unlink(missing_ok=True)
    return len(strays)


def load_vectors(parts: Sequence[Part], num_items: int) -> npt.NDArray[np.float32]:
    """Return all vectors in the order of item rows, [N, D] float32."""
    check_parts(parts, num_items)
    if not parts:
        raise ArtefactError("there are no encoded parts; the catalogue is empty")
    out = np.empty((num_items, parts[0].vectors().shape[1]), np.float32)
    for part in parts:
        out[part.item_rows()] = part.vectors()
    return out


def load_shard(parts: Sequence[Part], number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the (item_rows [n] ascending, vectors [n, D]) of one shard, each held once."""
    if not parts:
        raise ArtefactError("there are no encoded parts; the catalogue is empty")
    rows = np.concatenate([p.item_rows()[p.shard(number)] for p in parts])
    place = np.empty(len(rows), np.int64)
    place[np.argsort(rows, kind="stable")] = np.arange(len(rows))
    vectors = np.empty((len(rows), parts[0].vectors().shape[1]), np.float32)
    start = 0
    for part in parts:
        piece = part.vectors()[part.shard(number)]
        vectors[place[start : start + len(piece)]] = piece
        start += len(piece)
    return np.sort(rows), vectors


def blocks(parts: Sequence[Part]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Yield (item_rows [n], vectors [n, D]) of each part."""
    for part in parts:
        yield part.item_rows(), part.vectors()


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a ``.npy`` file so that a reader sees a whole file or none."""
    # Workers of several machines may write into one folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _open(path: str) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} can not be read ({error}); encode again") from None
    return array

"""One shard of a generation on disk. Runs without Ray.

Symbols: n items of a shard.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.artefacts import remove
from twotower.config import AttributeConfig
from twotower.data.attributes import attribute_columns
from twotower.data.dataset import ITEM_ROW
from twotower.errors import ArtefactError
from twotower.generations.files import FACTS, SHARD_FILES, read_shard_facts, write_items, write_shard_facts
from twotower.index.build import (
    build_shard,
    check_item_rows,
    read_trained,
    train_index,
    write_index,
)
from twotower.index.gpu import Gpu, gpus
from twotower.index.parts import Part, load_shard, save_array
from twotower.index.spec import empty_index, ivf_of

_READ_ROWS = 65_536
_TRAIN_POINTS = 65_536
"""Vectors that train an index without inverted lists, and the least for one with them."""


def write_shard(
    parts: list[Part],
    number: int,
    factory: str,
    item_paths: list[str],
    columns: list[str],
    attributes: dict[str, AttributeConfig],
    checkpoint_fingerprint: str,
    directory: str,
    threads: int,
    trained: str | None = None,
    on_gpu: bool = False,
) -> int:
    """Build one shard's index and write it with its item rows and item table; returns its number of items.

    A shard that an earlier run wrote whole is taken as it is.

    Args:
        parts: of the whole catalogue.
        number: of the shard.
        factory: FAISS factory string.
        item_paths: Parquet files of the catalogue.
        columns: of the item table, beside the id; those that it does not have are passed over.
        attributes: that queries can filter by.
        checkpoint_fingerprint: of what encoded the parts.
        directory: of the shard, created.
        threads: FAISS threads.
        trained: file of an empty index that was trained for all shards; None trains this one alone.
        on_gpu: let the first GPU of this process take over what it can.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    if (path / FACTS).is_file():
        return int(read_shard_facts(path)["rows"])
    # A run that was killed may have left files half written, and those of temporary names.
    for left in path.iterdir():
        remove(left)
    item_rows, vectors = load_shard(parts, number)
    check_item_rows(item_rows)
    shared = read_trained(Path(trained)) if trained is not None and len(vectors) else None
    index = build_shard(vectors, factory, threads, item_rows, shared, _gpu(on_gpu))
    write_index(index, path / "index.faiss")
    save_array(path / "item_rows.npy", item_rows)
    items = shard_items(item_paths, item_rows, [*columns, *attribute_columns(attributes).values()])
    write_items(path, items, attributes)
    write_shard_facts(path, len(item_rows), checkpoint_fingerprint, factory)
    return len(item_rows)


def shard_folders(directory: Path, count: int) -> list[Path]:
    """Return the folders of finished shards, in their order, and remove all else from the folder of shards.

    Args:
        directory: with a folder for each shard.
        count: of shards.

    Raises:
        ArtefactError: a shard is not there.
    """
    folders = [directory / f"{number:05d}" for number in range(count)]
    for path in directory.iterdir():
        if path not in folders:
            remove(path)
    for folder in folders:
        read_shard_facts(folder)
        for path in folder.iterdir():
            if path.name not in SHARD_FILES:
                remove(path)
    return folders


def train_shards(
    parts: list[Part],
    factory: str,
    points: int | None,
    seed: int,
    path: str,
    threads: int,
    on_gpu: bool = False,
) -> str | None:
    """Train what all shards share on vectors drawn over all parts, and write it; returns the path.

    What an earlier run wrote is taken as it is.

    Args:
        parts: of the whole catalogue.
        factory: FAISS factory string.
        points: vectors drawn; None takes 64 for each inverted list.
        seed: of the draw.
        path: of the file written.
        threads: FAISS threads.
        on_gpu: let the first GPU of this process take over what it can.

    Returns:
        None for a factory that needs no training; nothing is written then.

    Raises:
        ConfigError: there are too few vectors.
    """
    dim = parts[0].vectors().shape[1]
    index = empty_index(factory, dim)
    if index.is_trained:
        return None
    if Path(path).is_file():
        return path
    ivf = ivf_of(index)
    total = sum(p.num_rows for p in parts)
    wanted = points or max(64 * (0 if ivf is None else ivf.nlist), _TRAIN_POINTS)
    drawn = np.sort(np.random.default_rng(seed).permutation(total)[:wanted])
    ends = np.cumsum([p.num_rows for p in parts])
    cuts = np.searchsorted(drawn, ends)
    pieces, begin = [], 0
    for part, end, cut in zip(parts, ends, cuts, strict=True):
        pieces.append(part.vectors()[drawn[begin:cut] - (end - part.num_rows)])
        begin = cut
    trained = train_index(np.concatenate(pieces), factory, threads, _gpu(on_gpu))
    if trained is None:
        return None
    write_index(trained, Path(path))
    return path


def _gpu(on_gpu: bool) -> Gpu | None:
    return gpus()[0] if on_gpu and gpus() else None


def shard_items(paths: list[str], item_rows: npt.NDArray[np.int64], columns: list[str]) -> pa.Table:
    """Return the item table of a shard in the order of its ascending item rows, without reading the whole.

    Args:
        paths: Parquet files of the catalogue.
        item_rows: of the shard.
        columns: wanted beside the id; those that the files do not have are passed over.

    Raises:
        ArtefactError: an item is not there, or there twice.
    """
    present = pq.read_schema(paths[0]).names
    wanted = [c for c in dict.fromkeys(["item_id", *columns]) if c in present and c != ITEM_ROW]
    pieces = []
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(_READ_ROWS, columns=[ITEM_ROW, *wanted]):
            mine = np.isin(batch.column(ITEM_ROW).to_numpy(), item_rows)
            pieces.append(pa.Table.from_batches([batch]).filter(pa.array(mine)))
    table = pa.concat_tables(pieces).sort_by(ITEM_ROW)
    if not np.array_equal(table[ITEM_ROW].to_numpy(), item_rows):
        raise ArtefactError(f"the items of {paths[0]} and others are not those encoded; prepare them again")
    return table.select(wanted)

"""Vectors to FAISS indexes, and index files.

Files hold CPU indexes. A shard without items is an empty Flat index. Building holds the vectors given and
one index; the index is filled in one call, so that its storage is allocated once.

Symbols: D embedding_dim, n vectors of a shard.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from twotower.errors import ArtefactError, ConfigError, system_error
from twotower.index.gpu import Gpu
from twotower.index.gpu_build import add_with_rows, build_graph, train
from twotower.index.spec import (
    CAGRA,
    CAGRA_POOL,
    Effort,
    empty_index,
    innermost,
    is_cagra,
    ivf_of,
    keeps_rows,
    map_labels,
)

# FAISS's type hints leave out some classes.
_faiss: Any = faiss

_EMPTY = "Flat"
_CHECKED_ROWS = 65_536
_MIN_NORM = 1e-12
_READ_LOCK = threading.Lock()
_WRITE_BYTES = 1 << 20


def build_shard(
    vectors: npt.NDArray[np.float32],
    factory: str,
    threads: int = 1,
    item_rows: npt.NDArray[np.int64] | None = None,
    trained: Any = None,
    gpu: Gpu | None = None,
) -> Any:
    """Return a trained, filled FAISS index; label i is row i of ``vectors``, or its item row.

    Args:
        vectors: [n, D] float32; n may be 0.
        factory: FAISS index factory string.
        threads: FAISS threads used.
        item_rows: [n] int64, stored as labels by the kinds that keep them (``keeps_rows``).
        trained: an empty index of the factory, trained for all shards; it is filled. None trains one.
        gpu: takes over the work of ``builds_on_gpu`` indexes; what is returned is a CPU index all the same.

    Raises:
        ConfigError: an unknown factory string, too few vectors to train it, a vector that is zero or not
            finite, an index that can not give its vectors back, or ``CAGRA`` without a GPU.
    """
    dim = vectors.shape[1]
    index = empty_index(factory, dim) if trained is None else trained
    check_vectors(vectors)
    if len(vectors) == 0:
        return empty_index(_EMPTY, dim)
    if trained is None:
        _check_enough(index, factory, len(vectors))
    faiss.omp_set_num_threads(threads)
    data = np.ascontiguousarray(vectors, dtype=np.float32)
    try:
        labels = np.arange(len(data))
        if is_cagra(index):
            index = build_graph(data, gpu)
        else:
            if not index.is_trained:
                train(index, data, gpu)
            if item_rows is not None and keeps_rows(index):
                labels = np.ascontiguousarray(item_rows, dtype=np.int64)
                add_with_rows(index, data, labels, gpu)
            else:
                index.add(data)
    except RuntimeError as error:
        raise ConfigError(
            f"index.factory {factory!r} can not be built from {len(data)} vectors of {dim} dimensions: "
            f"{_last_line(error)}. Use Flat, a smaller index, or fewer shards"
        ) from None
    _probe(index, factory, data, labels)
    return index


def train_index(
    sample: npt.NDArray[np.float32], factory: str, threads: int = 1, gpu: Gpu | None = None
) -> Any | None:
    """Return an empty index trained for all shards; None for a factory that needs no training.

    Args:
        sample: [m, D] float32, drawn over all shards.
        factory: FAISS index factory string.
        threads: FAISS threads used.
        gpu: takes over the work of ``builds_on_gpu`` indexes.

    Raises:
        ConfigError: an unknown factory string, too few vectors, a vector that is zero or not finite.
    """
    index = empty_index(factory, sample.shape[1])
    if index.is_trained:
        return None
    check_vectors(sample)
    _check_enough(index, factory, len(sample))
    faiss.omp_set_num_threads(threads)
    train(index, np.ascontiguousarray(sample, dtype=np.float32), gpu)
    return index


def check_vectors(vectors: npt.NDArray[np.float32]) -> None:
    """Refuse vectors that are zero or not finite.

    Raises:
        ConfigError: with the first such row.
    """
    for start in range(0, len(vectors), _CHECKED_ROWS):
        block = vectors[start : start + _CHECKED_ROWS]
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise ConfigError(f"vector {row} holds NaN or infinity; the item tower is broken, train again")
        norms = np.einsum("nd,nd->n", block, block)
        if (norms < _MIN_NORM).any():
            row = start + int(np.argmax(norms < _MIN_NORM))
            raise ConfigError(f"vector {row} is zero; train again or leave its item out")


_PROBED = 4_096
"""Vectors that a factory string is tried on before there are any."""


def check_buildable(factory: str, dim: int, num_items: int, num_shards: int) -> None:
    """Find out before anything is encoded whether an index can be built, by building a small one.

    Args:
        factory: FAISS factory string, or ``CAGRA``, for which only its size is looked at: it needs a GPU.
        dim: D.
        num_items: of all shards, which are trained together.
        num_shards: of them.

    Raises:
        ConfigError: as ``build_shard``.
    """
    if factory == CAGRA:
        if num_items <= CAGRA_POOL * num_shards:
            raise ConfigError(
                f"index.kind cagra needs more than {CAGRA_POOL} vectors in a shard, and {num_shards} shards "
                f"share {num_items:,}; use fewer shards (index.num_shards), or index.kind: flat"
            )
        return
    index = empty_index(factory, dim)
    if factory == "Flat":
        return
    _check_enough(index, factory, num_items)
    ivf = ivf_of(index)
    if ivf is None or ivf.nlist <= _PROBED:
        vectors = np.random.default_rng(0).standard_normal((min(num_items, _PROBED), dim), dtype=np.float32)
        build_shard(vectors, factory, threads=1)


def check_item_rows(item_rows: npt.NDArray[np.int64]) -> None:
    """Refuse the item rows of a shard unless they are ascending without repeats, 0 or more.

    Raises:
        ConfigError: with the first row that breaks the order.
    """
    if len(item_rows) and item_rows[0] < 0:
        raise ConfigError(f"item row {item_rows[0]} is negative; item rows start at 0")
    steps = np.diff(item_rows)
    if (steps <= 0).any():
        at = int(np.argmax(steps <= 0))
        what = "occurs twice" if steps[at] == 0 else f"comes before {item_rows[at + 1]}"
        raise ConfigError(f"item row {item_rows[at]} {what} in a shard; give each item once and in order")


def write_index(index: Any, path: Path) -> None:
    """Write an index file so that a reader sees a whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # FAISS's own writer does not look whether the last bytes reached the disk.
        with open(temporary, "wb") as file:
            faiss.write_index(index, _faiss.PyCallbackIOWriter(file.write, _WRITE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.replace(temporary, path)


def read_index(path: Path, factory: str, dim: int, rows: int) -> Any:
    """Return the index of a file, memory-mapped where its kind allows.

    Args:
        path: written by ``write_index``; check its SHA-256 first when it comes from elsewhere.
        factory: the factory string that it was built with.
        dim: D that it must have.
        rows: n that it must have.

    Raises:
        ArtefactError: the file is missing, damaged, can not be read now, or holds another index than the one
            described; ``may_pass`` tells.
        MemoryError: there is no room for it now.
    """
    expected = type(empty_index(factory if rows else _EMPTY, dim))
    index = _read_limited(path)
    if not isinstance(index, expected) or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ArtefactError(f"{path} holds a {type(index).__name__}, {factory!r} is a {expected.__name__}")
    if index.d != dim or index.ntotal != rows:
        raise ArtefactError(
            f"{path} holds {index.ntotal} vectors of {index.d} dimensions; its manifest says {rows} of {dim}"
        )
    return index


def read_trained(path: Path) -> Any:
    """Return the trained, empty index of a file, to be filled.

    Raises:
        ArtefactError: the file is missing, damaged, or can not be read now; ``may_pass`` tells.
        MemoryError: there is no room for it now.
    """
    return _read_limited(path, 0)


def _read_limited(path: Path, flags: int = faiss.IO_FLAG_MMAP_IFC) -> Any:
    try:
        return _read(path, path.stat().st_size, flags)
    except FileNotFoundError:
        raise ArtefactError(f"{path} is missing; build the generation again") from None
    except OSError as error:
        raise ArtefactError(f"{path} can not be read ({error.strerror}); try again") from None
    except RuntimeError as error:
        raise ArtefactError(f"{path} is damaged ({_last_line(error)}); build it again") from None


def _read(path: Path, size: int, flags: int) -> Any:
    # No vector inside a file is larger than the file, and no loop runs once for less than a byte.
    with _READ_LOCK:
        limits = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(size)
        try:
            # Inner products have no use for the tables of IVFPQ, which may be larger than the file.
            return faiss.read_index(str(path), flags | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        except MemoryError:
            raise MemoryError(f"there is no memory for {path}, a file of {size:,} bytes") from None
        except RuntimeError as error:
            refused = system_error(error)
            # An empty file is damaged, and so refused.
            if refused is None or refused.errno == errno.EINVAL:
                raise
            raise refused from None
        finally:
            faiss.set_deserialization_vector_byte_limit(limits[0])
            faiss.set_deserialization_loop_limit(limits[1])


def _check_enough(index: Any, factory: str, count: int) -> None:
    ivf, inner = ivf_of(index), innermost(index)
    if ivf is not None and count < ivf.nlist:
        raise ConfigError(
            f"index.factory {factory!r} has {ivf.nlist} centroids, but there are only {count} vectors to "
            f"train it; use at most IVF{max(count // 39, 1)}, fewer shards (index.num_shards), or Flat"
        )
    # FAISS prints a warning for each clustering below 39 points a centroid; recall is measured instead.
    for trained in (ivf, getattr(inner, "pq", None)):
        if trained is not None:
            trained.cp.min_points_per_centroid = 1


def _probe(index: Any, factory: str, data: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
    """Find out now, not in the service, what the index can not do."""
    held = index.ntotal
    map_labels(index, int(labels[-1]) + 1)
    try:
        vector = index.reconstruct(int(labels[0]))
        index.search(data[:1], 1, params=Effort().parameters(index))
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"index.factory {factory!r} can not be searched with parameters or give back its vectors "
            f"({_last_line(error)}); use Flat, HNSW or IVF"
        ) from None
    if not np.isfinite(vector).all():
        raise ConfigError(f"index.factory {factory!r} gives back NaN or infinity; use another kind")
    ivf = ivf_of(index)
    if ivf is not None:
        # The map is rebuilt when the file is opened; it is no part of the file.
        ivf.set_direct_map_type(_faiss.DirectMap.NoMap)
        if keeps_rows(index):
            ivf.ntotal = faiss.downcast_index(index).ntotal = held


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1].rsplit(".cpp:", 1)[-1].split(": ", 1)[-1]

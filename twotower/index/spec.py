"""What an index is asked to be: its FAISS factory string, an item's shard, and how hard a search looks.

Symbols: D embedding_dim, N items, S shards.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from twotower.errors import ConfigError

# FAISS's type hints leave out the fields of search parameters.
_faiss: Any = faiss

CAGRA = "CAGRA"
"""Factory string of the graph that cuVS builds on a GPU, which FAISS's factory does not know."""
CAGRA_DEGREE, CAGRA_POOL = 64, 128
"""Neighbours of each of its vectors, and the near vectors that they are chosen from."""

_LEAST_EF, _MOST_EF = 16, 2_048
_MOST_K_FACTOR = 128

PLAIN_IVF = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
"""Kinds whose lists can be searched and filled apart from choosing them."""
KNOWN_GOOD = "Flat, HNSW32, HNSW32,SQ8, IVF256,Flat, IVF256,SQ8 or IVF256,PQ16"


def shard_of(item_ids: Iterable[str], num_shards: int) -> npt.NDArray[np.int32]:
    """Return the shard of each item id, [N] int32 in [0, num_shards).

    It depends on the id's text and the number of shards alone, so that an item stays where it is when the
    catalogue around it changes.
    """
    if num_shards < 1:
        raise ConfigError(f"index.num_shards ({num_shards}) must be at least 1")
    hashes = np.fromiter((zlib.crc32(i.encode()) for i in item_ids), dtype=np.uint64)
    # CRC-32 is linear: similar ids would fill some shards more than others without this mix (splitmix64).
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    return (hashes % np.uint64(num_shards)).astype(np.int32)


def empty_index(factory: str, dim: int) -> Any:
    """Return the untrained inner-product index of a factory string, or of ``CAGRA``.

    Raises:
        ConfigError: FAISS does not know the string, or the kind can not hold inner products or plain vectors.
    """
    if factory == CAGRA:
        return _faiss.IndexHNSWCagra(dim, CAGRA_DEGREE // 2, faiss.METRIC_INNER_PRODUCT)
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"index.factory {factory!r} is no index for inner products that FAISS can make with "
            f"{dim} dimensions ({_reason(error)}); use for example {KNOWN_GOOD}"
        ) from None
    if isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        raise ConfigError(
            f"index.factory {factory!r} keeps ids of its own, but shards number their vectors themselves; "
            "take IDMap out of it"
        )
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ConfigError(f"index.factory {factory!r} has no inner products; use for example {KNOWN_GOOD}")
    ivf = ivf_of(index)
    if ivf is not None and ivf.nlist < 1:
        raise ConfigError(f"index.factory {factory!r} has {ivf.nlist} centroids; at least 1 is needed")
    _without_renumbering(index)
    return index


def _without_renumbering(index: Any) -> None:
    """Let product quantizers keep the numbers that their centroids get by training.

    FAISS renumbers them for its search by Hamming distances, which is not used here: answers are the same
    without, and training takes more than a second less for each byte of a code.
    """
    inner: Any = innermost(index)
    if isinstance(inner, faiss.IndexHNSW):
        inner = faiss.downcast_index(inner.storage)
    if isinstance(inner, (faiss.IndexPQ, faiss.IndexIVFPQ)):
        inner.do_polysemous_training = False  # type: ignore[union-attr]


def ivf_of(index: Any) -> Any | None:
    """Return the inverted-file index inside an index, or None when it has none."""
    index = innermost(index)
    return index if isinstance(index, faiss.IndexIVF) else None


def innermost(index: Any) -> Any:
    """Return the index that is inside refinements and vector transforms, often the index itself."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return innermost(index.index)
    if isinstance(index, faiss.IndexRefine):
        return innermost(index.base_index)
    return index


def is_cagra(index: Any) -> bool:
    """Return whether an index is a graph built on a GPU, in the form that CPUs search."""
    return isinstance(faiss.downcast_index(index), _faiss.IndexHNSWCagra)


def builds_on_gpu(index: Any) -> bool:
    """Return whether building an index like this is work that a GPU takes over."""
    return is_cagra(index) or ivf_of(index) is not None


def keeps_rows(index: Any) -> bool:
    """Return whether an index stores item rows as its labels; others number their vectors from 0."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return keeps_rows(index.index)
    return isinstance(index, faiss.IndexIVF)


def map_labels(index: Any, num_labels: int) -> None:
    """Let an inverted-file index find the vector of a label in [0, num_labels); others can do so already."""
    ivf = ivf_of(index)
    if ivf is None:
        return
    if keeps_rows(index):
        # FAISS makes the map as long as the number of vectors it believes to hold.
        ivf.ntotal = faiss.downcast_index(index).ntotal = num_labels
    ivf.make_direct_map()


def _reason(error: Exception) -> str:
    return str(error).rsplit("Error: ", 1)[-1].rsplit(": ", 1)[-1].strip()


@dataclass(frozen=True)
class Effort:
    """How hard a search looks; a part that an index does not have is not used."""

    nprobe: int = 1
    """Inverted lists visited, of an IVF index."""
    ef_search: int = 64
    """Candidates kept while walking the graph, of an HNSW or CAGRA index."""
    k_factor: float = 4.0
    """Candidates taken for each result, of an index with a refinement."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    def parameters(self, index: Any, selector: Any = None) -> Any | None:
        """Return fresh FAISS search parameters for one call on an index; None when it takes none.

        They belong to the caller: FAISS writes into them in some calls, so threads can not share them.

        Args:
            index: what is searched.
            selector: of the labels that may be found; it must live until the search is over.
        """
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexPreTransform):
            inner = self.parameters(index.index, selector)
            return None if inner is None else _faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexRefine):
            inner = self.parameters(index.base_index, selector)
            if inner is None:
                return _faiss.IndexRefineSearchParameters(k_factor=self.k_factor)
            return _faiss.IndexRefineSearchParameters(k_factor=self.k_factor, base_index_params=inner)
        given = {} if selector is None else {"sel": selector}
        if isinstance(index, faiss.IndexIVFRaBitQ):
            return _faiss.IVFRaBitQSearchParameters(nprobe=min(self.nprobe, index.nlist), **given)
        if isinstance(index, faiss.IndexIVF):
            return _faiss.SearchParametersIVF(nprobe=min(self.nprobe, index.nlist), **given)
        if isinstance(index, faiss.IndexHNSW):
            # bounded_queue stays on: without it FAISS 1.15 ignores selectors.
            return _faiss.SearchParametersHNSW(efSearch=self.ef_search, bounded_queue=True, **given)
        return _faiss.SearchParameters(**given) if given else None


def efforts(index: Any) -> list[Effort]:
    """Return the efforts worth trying on an index, from the least to the most; one when it has no choice.

    Where a search among inverted lists is refined, both grow along the way.
    """
    inner = innermost(index)
    steps = [Effort()]
    if isinstance(inner, faiss.IndexIVF):
        steps = [Effort(nprobe=n) for n in _ladder(1, int(inner.nlist))]
    elif isinstance(inner, faiss.IndexHNSW):
        steps = [Effort(ef_search=n) for n in _ladder(_LEAST_EF, _MOST_EF)]
    if not _is_refined(index):
        return steps
    factors = _ladder(1, _MOST_K_FACTOR)
    longest = max(len(steps), len(factors))
    return [
        replace(
            steps[i * (len(steps) - 1) // (longest - 1)],
            k_factor=float(factors[i * (len(factors) - 1) // (longest - 1)]),
        )
        for i in range(longest)
    ]


def _ladder(first: int, last: int) -> list[int]:
    """Return whole numbers about a twentieth apart, both ends among them."""
    steps = [first]
    while steps[-1] < last:
        steps.append(min(max(steps[-1] + 1, int(steps[-1] * 1.05)), last))
    return steps


def _is_refined(index: Any) -> bool:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _is_refined(index.index)
    return isinstance(index, faiss.IndexRefine)

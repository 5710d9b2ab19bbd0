"""Units on GPUs: copies of the shards of an index, spread over the GPUs of this machine.

Files hold CPU indexes; a machine with GPUs and the GPU build of FAISS copies them when it opens them. A GPU
has one lock and one set of resources: FAISS's GPU indexes are not safe for threads even for reads. What FAISS
can not do on a GPU (selectors, which it passes over in silence, more than ``MOST`` results or lists, HNSW
graphs) is done on the CPU, and so is scoring of vectors that were gathered.

A flat copy is as exact as the CPU: it holds float32, and FAISS multiplies in float32 unless cuVS or float16
are asked for, which nothing here does.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np

from twotower.index.spec import CAGRA_DEGREE, CAGRA_POOL, Effort, is_cagra, ivf_of
from twotower.index.units import FloatArray, IntArray, Unit, units_of
from twotower.progress import say

MOST = 2_048
"""Results, and lists visited, up to which FAISS searches on a GPU."""
MOST_OF_CAGRA = 1_024
"""Results up to which cuVS searches its graph."""
BLOCK = 8_192
"""Queries of a call: larger ones take memory for all their results, and some kinds fail above 65,536."""

_RANDOM_SAMPLINGS = 8
"""Draws of start nodes; with FAISS's one, two fifths of the answers can be missing from clustered vectors."""
_CANDIDATES_OF_BLOCK = 32
"""cuVS keeps candidates in whole blocks of so many."""

_faiss: Any = faiss


class Gpu:
    """One GPU: FAISS's memory on it, and the lock of everything that FAISS does there."""

    def __init__(self, device: int) -> None:
        """Reserve FAISS's scratch memory.

        Args:
            device: number of the GPU.
        """
        self.device = device
        self.resources = _faiss.StandardGpuResources()
        self.lock = threading.Lock()

    def copy(self, index: Any) -> Any | None:
        """Return a copy of a CPU index on this GPU; None where it has no GPU form or no room, which is said.

        A copy of a graph needs the CPU index as long as it lives.
        """
        index = faiss.downcast_index(index)
        try:
            with self.lock:
                if is_cagra(index):
                    copy = self.graph(index.d)
                    copy.copyFrom(index)
                    return copy
                return _faiss.index_cpu_to_gpu(self.resources, self.device, index)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].rsplit(": ", 1)[-1]
            say(f"GPU {self.device}: {type(index).__name__} is searched on the CPU ({reason})")
            return None

    def flat(self, dim: int, metric: int) -> Any:
        """Return an empty exact index of float32 on this GPU."""
        config = _faiss.GpuIndexFlatConfig()
        config.device = self.device
        return _faiss.GpuIndexFlat(self.resources, dim, metric, config)

    def graph(self, dim: int) -> Any:
        """Return an empty CAGRA index of inner products on this GPU."""
        config = _faiss.GpuIndexCagraConfig()
        config.device = self.device
        config.graph_degree = CAGRA_DEGREE
        config.intermediate_graph_degree = CAGRA_POOL
        # The other way trains product codes first, for which a small shard has too few vectors.
        config.build_algo = _faiss.graph_build_algo_NN_DESCENT
        return _faiss.GpuIndexCagra(self.resources, dim, faiss.METRIC_INNER_PRODUCT, config)


class GpuUnit(Unit):
    """An index that is searched on a GPU wherever that can do what is asked."""

    def __init__(self, index: Any, item_rows: IntArray, dead: IntArray, gpu: Gpu) -> None:
        """Copy the index; arguments as of ``Unit``."""
        # Before the CPU index is told of labels beyond its vectors.
        self._copy = gpu.copy(index)
        super().__init__(index, item_rows, dead)
        self.gpu = gpu
        ivf = ivf_of(self.index)
        self._nlist = 0 if ivf is None else int(ivf.nlist)
        self._is_cagra = is_cagra(self.index)

    def _labels(
        self, queries: FloatArray, k: int, effort: Effort, selector: Any = None
    ) -> tuple[FloatArray, IntArray]:
        most = MOST_OF_CAGRA if self._is_cagra else MOST
        if self._copy is None or selector is not None or max(k, self._lists(effort)) > most:
            return super()._labels(queries, k, effort, selector)
        found: list[tuple[FloatArray, IntArray]] = []
        for start in range(0, len(queries), BLOCK):
            with self.gpu.lock:
                block = queries[start : start + BLOCK]
                found.append(self._copy.search(block, k, params=self._parameters(k, effort)))
        if len(found) == 1:
            return found[0]
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def _lists(self, effort: Effort) -> int:
        return min(effort.nprobe, self._nlist)

    def _parameters(self, k: int, effort: Effort) -> Any | None:
        if not self._is_cagra:
            return effort.parameters(self.index)
        # FAISS dies of parameters of another class. The algorithm is fixed: cuVS's choice goes by the number
        # of queries, and what was measured on a batch would not hold for one query.
        return _faiss.SearchParametersCagra(
            itopk_size=cagra_candidates(k, effort),
            num_random_samplings=_RANDOM_SAMPLINGS,
            algo=_faiss.search_algo_MULTI_CTA,
        )


def cagra_candidates(k: int, effort: Effort) -> int:
    """Return how many candidates cuVS keeps: those of the effort, at least k, in whole blocks."""
    return -(-max(k, effort.ef_search) // _CANDIDATES_OF_BLOCK) * _CANDIDATES_OF_BLOCK


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that FAISS can use in this process; none with the CPU build."""
    return tuple(Gpu(device) for device in range(faiss.get_num_gpus()))


def faiss_has_gpus() -> bool:
    """Return whether FAISS is built for GPUs, be there one here or not."""
    return hasattr(_faiss, "StandardGpuResources")


def placed(shards: Sequence[tuple[Any, IntArray, IntArray]], on: Sequence[Gpu]) -> list[Unit]:
    """Return the units of (index, item rows, dead rows) of shards, spread over GPUs where there are any.

    Shards that lie on one GPU are joined as on a CPU.
    """
    if not on:
        return units_of(shards)
    places = spread([len(item_rows) for _, item_rows, _ in shards], len(on))
    units: list[Unit] = []
    for number, gpu in enumerate(on):
        mine = [shard for shard, place in zip(shards, places, strict=True) if place == number]
        units += units_of(mine, functools.partial(GpuUnit, gpu=gpu))
    return units


def spread(sizes: Sequence[int], num_places: int) -> list[int]:
    """Return the place of each size: the largest comes first, each goes to the place that holds the least."""
    held = [0] * num_places
    places = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        place = held.index(min(held))
        places[number] = place
        held[place] += sizes[number]
    return places

"""Units on GPUs: copies of the shards of an index, spread over the GPUs of this machine.

Files hold CPU indexes; a machine with GPUs and the GPU build of FAISS copies them when it opens them. A copy
is searched under its GPU's lock, since FAISS's GPU indexes are not safe for threads even for reads. What
FAISS can not do on a GPU (selectors, more than ``MOST`` results or lists, graphs) is done on the CPU.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import faiss

from twotower.index.spec import Effort
from twotower.index.units import FloatArray, IntArray, Unit, units_of

MOST = 2_048
"""Results, and lists visited, up to which FAISS searches on a GPU."""

_faiss: Any = faiss


class Gpu:
    """One GPU: FAISS's memory on it, and the lock of its searches."""

    def __init__(self, device: int) -> None:
        """Reserve FAISS's scratch memory.

        Args:
            device: number of the GPU.
        """
        self.device = device
        self.resources = _faiss.StandardGpuResources()
        self.lock = threading.Lock()

    def copy(self, index: Any) -> Any | None:
        """Return a copy of a CPU index on this GPU; None for kinds that have no GPU form."""
        try:
            with self.lock:
                return _faiss.index_cpu_to_gpu(self.resources, self.device, index)
        except RuntimeError:
            return None


class GpuUnit(Unit):
    """A shard that is searched on a GPU wherever that can do what is asked."""

    def __init__(self, index: Any, item_rows: IntArray, dead: IntArray, gpu: Gpu) -> None:
        """Copy the index; arguments as of ``Unit``."""
        # Before the CPU index is told of labels beyond its vectors.
        self._copy = gpu.copy(index)
        super().__init__(index, item_rows, dead)
        self.gpu = gpu

    def _labels(
        self, queries: FloatArray, k: int, effort: Effort, selector: Any = None
    ) -> tuple[FloatArray, IntArray]:
        if self._copy is None or selector is not None or k > MOST or effort.nprobe > MOST:
            return super()._labels(queries, k, effort, selector)
        with self.gpu.lock:
            scores, labels = self._copy.search(queries, k, params=effort.parameters(self.index))
        return scores, labels


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that FAISS can use in this process; none with the CPU build."""
    return tuple(Gpu(device) for device in range(faiss.get_num_gpus()))


def placed(shards: Sequence[tuple[Any, IntArray, IntArray]], on: Sequence[Gpu]) -> list[Unit]:
    """Return the units of (index, item rows, dead rows) of shards, spread over GPUs where there are any.

    Shards are not joined there: each lies on one GPU, one after the other in turn.
    """
    if not on:
        return units_of(shards)
    filled = [shard for shard in shards if len(shard[1])]
    units = [GpuUnit(*shard, on[n % len(on)]) for n, shard in enumerate(filled)]
    return [unit for unit in units if len(unit.item_rows)]

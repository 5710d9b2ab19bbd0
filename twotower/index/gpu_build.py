"""Building CPU indexes with the help of a GPU.

What takes the time of an inverted-file index is the nearest centroid of a vector: k-means asks for it ten
times for each vector of the sample, and filling once for each vector. An exact index on the GPU answers that,
through the hooks that FAISS has for it; centroids, codes and lists are made by the CPU index itself, so that
its labels and settings are those of a build without a GPU. A CAGRA graph is built by cuVS as a whole, and
copied into the form that CPUs search.

Symbols: D embedding_dim, n vectors of a shard.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from twotower.errors import ConfigError
from twotower.index.gpu import Gpu
from twotower.index.spec import CAGRA_POOL, PLAIN_IVF, ivf_of

_faiss: Any = faiss

_BLOCK = 65_536


def train(index: Any, data: npt.NDArray[np.float32], gpu: Gpu | None) -> None:
    """Train an index, on a GPU those clusterings that are large.

    Args:
        index: untrained.
        data: [n, D] float32, contiguous.
        gpu: None trains on the CPU.
    """
    with contextlib.ExitStack() as hooks:
        ivf = ivf_of(index)
        if gpu is not None and ivf is not None:
            hooks.enter_context(gpu.lock)
            centroids = gpu.flat(ivf.d, ivf.metric_type)
            hooks.enter_context(_hooked(ivf, "clustering_index", centroids))
            pq = getattr(ivf, "pq", None)
            if pq is not None:
                codes = gpu.flat(pq.dsub, faiss.METRIC_L2)
                hooks.enter_context(_hooked(pq, "assign_index", codes))
        index.train(data)


def add_with_rows(
    index: Any, data: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], gpu: Gpu | None
) -> None:
    """Fill an inverted-file index; the lists of plain kinds are allocated once, at their length.

    Args:
        index: trained, of a kind that keeps labels.
        data: [n, D] float32, contiguous.
        labels: [n] int64, contiguous.
        gpu: finds the lists of plain kinds; None leaves that to the CPU.
    """
    index = faiss.downcast_index(index)
    if type(index) not in PLAIN_IVF:
        index.add_with_ids(data, labels)
        return
    lists = _nearest_lists(index, data, gpu)
    # FAISS's own adding lets lists grow by doubling: twice the memory at worst, and all is copied again.
    for number, size in enumerate(np.bincount(lists, minlength=index.nlist).tolist()):
        index.invlists.resize(number, size)
        index.invlists.resize(number, 0)
    pointer = _faiss.swig_ptr
    index.add_core(len(data), pointer(data), pointer(labels), pointer(lists))


def _nearest_lists(index: Any, data: npt.NDArray[np.float32], gpu: Gpu | None) -> npt.NDArray[np.int64]:
    """Return the inverted list of each vector, [n] int64."""
    with contextlib.ExitStack() as held:
        quantizer = index.quantizer
        if gpu is not None and isinstance(faiss.downcast_index(quantizer), faiss.IndexFlat):
            held.enter_context(gpu.lock)
            nearest = gpu.flat(index.d, index.metric_type)
            nearest.add(quantizer.reconstruct_n(0, index.nlist))
            quantizer = nearest
        lists = np.empty(len(data), np.int64)
        for start in range(0, len(data), _BLOCK):
            lists[start : start + _BLOCK] = quantizer.search(data[start : start + _BLOCK], 1)[1][:, 0]
    return lists


def build_graph(data: npt.NDArray[np.float32], gpu: Gpu | None) -> Any:
    """Return the CAGRA graph of vectors, in the form that CPUs search; label i is row i.

    Args:
        data: [n, D] float32, contiguous.
        gpu: that builds it.

    Raises:
        ConfigError: there is no GPU, FAISS was built without cuVS, or there are too few vectors.
    """
    require_gpu(gpu is not None)
    assert gpu is not None
    if len(data) <= CAGRA_POOL:
        raise ConfigError(
            f"index.kind cagra needs more than {CAGRA_POOL} vectors in a shard, and one has {len(data)}; use "
            "fewer shards (index.num_shards), or index.kind: flat"
        )
    graph = _faiss.IndexHNSWCagra()
    with gpu.lock:
        built = gpu.graph(data.shape[1])
        built.train(data)
        # It reads the vectors from where they were when it was trained.
        built.copyTo(graph)
    return graph


def require_gpu(there: bool) -> None:
    """Refuse to build a CAGRA graph without a GPU, or with a FAISS that was built without cuVS.

    Args:
        there: whether there is a GPU to build on.

    Raises:
        ConfigError: with what to do.
    """
    remedy = (
        "build on a cluster with an NVIDIA GPU (cluster.use_gpu: auto) and `make setup FLAVOUR=gpu`, or take "
        "index.kind: hnsw, a graph that CPUs build"
    )
    if not there:
        raise ConfigError(f"index.kind cagra is built on a GPU, and this build has none; {remedy}")
    if not hasattr(_faiss, "GpuIndexCagra"):
        raise ConfigError(f"index.kind cagra is built by cuVS, and FAISS here is built without it; {remedy}")


@contextlib.contextmanager
def _hooked(owner: Any, name: str, index: Any) -> Iterator[None]:
    """Let FAISS use an index inside the block; it does not keep it alive itself."""
    setattr(owner, name, index)
    try:
        yield
    finally:
        setattr(owner, name, None)

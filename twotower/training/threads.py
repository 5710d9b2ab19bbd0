"""How many CPU threads torch and FAISS use in this process, for a while."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Give torch so many CPU threads inside the block, and the caller's own number back behind it.

    By itself torch takes a thread for each core. On a machine where others work too, each operation then
    waits for the thread that was not scheduled: a step of two threads on two busy cores takes ten times as
    long as one of one thread. What FAISS is set to inside the block is undone as well, where it is loaded.

    Args:
        count: of threads, 1 or more.
    """
    before = torch.get_num_threads()
    faiss = sys.modules.get("faiss")
    before_faiss = None if faiss is None else faiss.omp_get_max_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        # It may have been imported inside the block, where it began with what the process had.
        faiss = sys.modules.get("faiss")
        if faiss is not None:
            faiss.omp_set_num_threads(before if before_faiss is None else before_faiss)
        torch.set_num_threads(before)

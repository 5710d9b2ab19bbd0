"""What the workers of an evaluation do: join encoded items, rank users, place items, time requests."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from twotower.config import GeneratedSource
from twotower.data.dataset import Dataset
from twotower.evaluation.baselines import TrueRanker
from twotower.evaluation.baselines.rankers import open_ranker
from twotower.evaluation.comparison import Measure, ModelRanker, Ranker, compare
from twotower.evaluation.holdout import open_arrays
from twotower.evaluation.outcomes import write_outcomes
from twotower.evaluation.report import place_items
from twotower.index.parts import Part, check_parts
from twotower.model.checkpoint import Checkpoint
from twotower.progress import bar
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever

WARM_UP = 20
"""Requests before the timed ones."""
_PROBES = 1_000
"""Users whose lists without masks show whether the model tells users apart."""


def join_vectors(parts: list[Part], num_items: int, path: str) -> None:
    """Write encoded parts as one array [N, D] float32 in the order of item rows, to be memory-mapped."""
    check_parts(parts, num_items)
    dim = parts[0].vectors().shape[1]
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_items, dim))
    for part in parts:
        out[part.item_rows()] = part.vectors()
    out.flush()


def place_popular(vectors: str, rows: NDArray[np.int64], width: int, seed: int) -> NDArray[np.float64]:
    """Return the places of the items at ``rows`` [n] on the map of a report, see ``place_items``.

    Args:
        vectors: file of [N, D] float32.
        rows: [n] int64.
        width: leading coordinates that count; the last one is no part of nearness where it is a bias.
        seed: of the map.
    """
    torch.set_num_threads(1)
    return place_items(np.load(vectors, mmap_mode="r")[rows][:, :width], seed)


class RankUsers:
    """Ranks ranges of the test users; a worker of a runner."""

    def __init__(
        self, scratch: str, dataset: str, checkpoint: str, rankers: list[str], device: str, threads: int
    ) -> None:
        """Open the model and memory-map the vectors, the users and the baselines.

        Args:
            scratch: folder with the arrays of ``evaluation.holdout``, the vectors, facts and baselines.
            dataset: directory of the dataset.
            checkpoint: directory of the checkpoint.
            rankers: names of those that are measured, the model first.
            device: for the model and the ranking.
            threads: CPU threads.
        """
        torch.set_num_threads(threads)
        folder = Path(scratch)
        self._held, query = open_arrays(folder)
        self._measure = Measure.open(folder / "facts")
        self._outcomes = folder / "outcomes"
        self._rankers: dict[str, Ranker] = {}
        for name in rankers:
            if name == "model":
                vectors = np.load(folder / "vectors.npy", mmap_mode="r")
                self._rankers[name] = ModelRanker(Checkpoint.open(checkpoint, device), query, vectors)
            elif name == "true_model":
                opened = Dataset.open(dataset)
                assert isinstance(opened.source, GeneratedSource), "only generated data has a true model"
                self._rankers[name] = TrueRanker(opened.source, opened.user_ids)
            else:
                self._rankers[name] = open_ranker(name, folder / "baselines")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Measure each ranker on the range in the first row, and write what they come to."""
        start, stop = batch["start"][0].as_py(), batch["stop"][0].as_py()
        # A fair share of the probes; ranges are of nearly equal size.
        probes = -(-_PROBES * (stop - start) // len(self._held))
        measured = compare(self._rankers, self._held, start, stop, self._measure, probes)
        write_outcomes(self._outcomes, start, measured)
        return pa.table({"users": [stop - start]})


def time_requests(generation_dir: Path, user_ids: list[str], k: int) -> NDArray[np.float64]:
    """Return the milliseconds of single requests, one after the other; the first 20 warm up, uncounted."""
    retriever = Retriever.open(generation_dir, threads=1)
    milliseconds = []
    with bar(len(user_ids), "time requests", unit="requests") as progress:
        for user_id in user_ids:
            begin = time.perf_counter()
            retriever.retrieve(Query(user_id=user_id, k=k))
            milliseconds.append((time.perf_counter() - begin) * 1000.0)
            progress.update()
    return np.array(milliseconds[WARM_UP:])

"""Exact evaluation of a test of Gowalla's size, over the bare matrix product and top-k.

``evaluate_over_bare``: ranking 29,858 users over all 40,981 items without the items of their train split
(d = 64, k = 20), every metric of the report, by user, by slice and of the lists, over nothing but
``queries @ items.T`` and ``torch.topk`` in blocks of the fastest size of a few, in turn on one thread.
``rank_over_bare``: the ranking alone, masks included.

Vectors are random; how many items users have had, and take next, is spread as on Gowalla. Ours is what an
actor of ``pipeline.evaluate`` does with its ranges of users after their encoding, and what is made of its
files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import measure
from twotower.config import parse_config
from twotower.data.knowledge import Holdout
from twotower.evaluation.comparison import Measure, Outcome, compare
from twotower.evaluation.lists import ItemFacts
from twotower.evaluation.outcomes import Outcomes, write_outcomes
from twotower.evaluation.ranking import rank_block
from twotower.pipeline.runner import ranges

USERS, ITEMS, DIM, K = 29_858, 40_981, 64, 20
TRAIN, TEST = 810_128, 217_242
"""Pairs of Gowalla's train and test split."""
FEWEST, MOST, SPREAD = 8, 811, 1.3
"""Fewest and most train items of a user, and the standard deviation of the logarithm of those counts
beside the fewest: half of Gowalla's users have up to 16, a tenth over 53."""
PROBES = 1_000
BLOCKS = (64, 256)
"""Queries that the bare product and top-k take at once."""
TASTE = 0.35
"""Length of what a user has in common with the items he takes, so that lists hold some of them."""

Floats = NDArray[np.float32]


class Task:
    """A test of some size with the embeddings of a model."""

    def __init__(self, users: int, items: int, seed: int = 0) -> None:
        """Draw it.

        Args:
            users: of the test, Q.
            items: of the catalogue, N.
            seed: of the draw.
        """
        rng = np.random.default_rng(seed)
        self.vectors = _unit(rng.standard_normal((items, DIM), dtype=np.float32))
        """[N, D] float32."""
        had = lengths(rng, users, TRAIN / USERS, min(MOST, items // 4))
        taken = np.maximum(np.round(had * (TEST / TRAIN)), 1).astype(np.int64)
        popularity = 1.0 / np.arange(1, items + 1) ** 0.7
        cumulated = np.cumsum(rng.permutation(popularity))
        drawn = np.searchsorted(cumulated, rng.random(int((had + taken).sum())) * cumulated[-1], side="right")
        user = np.repeat(np.arange(users), had + taken)
        # A user's items are different ones, in random order; the first of them are his train split.
        pairs, first = np.unique(user * items + drawn, return_index=True)
        order = np.argsort(first)
        user, row = np.divmod(pairs[order], items)
        place = np.arange(len(user)) - np.repeat(_starts(user, users), np.bincount(user, minlength=users))
        train = place < np.maximum(np.bincount(user, minlength=users) - taken, 1)[user]
        self.held = Holdout(
            np.arange(users),
            *_compressed(user, row, train, users),
            *_compressed(user, row, ~train, users),
            {},
        )
        """Users, what is masked and what is relevant."""
        counts = np.bincount(row[train], minlength=items)
        mean = np.zeros((users, DIM), np.float32)
        np.add.at(mean, user[~train], self.vectors[row[~train]])
        noise = _unit(rng.standard_normal((users, DIM), dtype=np.float32))
        self.queries = _unit(noise + TASTE * mean)
        """[Q, D] float32."""
        thirds = np.searchsorted([items // 20, items // 4], np.argsort(np.argsort(-counts)), side="right")
        slices = np.stack([thirds == number for number in range(3)])
        self.measure = Measure([K], ItemFacts(counts, users), slices)
        """Head, middle and tail of the catalogue are its slices."""

    def rank(self, start: int, part: Holdout, k: int) -> NDArray[np.int64]:
        """Return lists [Q, k] int64; a ``Ranker``."""
        queries = self.queries[start : start + len(part)]
        return rank_block(queries, self.vectors, part.masked_offsets, part.masked_rows, k)


def lengths(rng: np.random.Generator, users: int, mean: float, most: int) -> NDArray[np.int64]:
    """Return how many train items users have, [users] int64, log-normal around a mean of about ``mean``."""
    beside = np.exp(rng.normal(0, SPREAD, users))
    scaled = FEWEST + beside * ((mean - FEWEST) / np.exp(SPREAD**2 / 2))
    return np.minimum(np.round(scaled), most).astype(np.int64)


def bare(queries: torch.Tensor, vectors: torch.Tensor, block: int) -> NDArray[np.int64]:
    """Return the K best rows of each query, [Q, K] int64, with nothing masked."""
    parts = [torch.topk(part @ vectors.T, K, dim=1).indices for part in queries.split(block)]
    return torch.cat(parts).numpy()


def evaluate(task: Task) -> tuple[Outcome, float]:
    """Return what the model comes to on the whole test, and how alike its lists are before masking."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ranges(len(task.held), parse_config({})):
            start, stop = part["start"], part["stop"]
            probes = -(-PROBES * (stop - start) // len(task.held))
            write_outcomes(
                Path(folder),
                start,
                compare({"model": task.rank}, task.held, start, stop, task.measure, probes),
            )
        outcomes = Outcomes(Path(folder), ["model"], task.measure)
        return outcomes.merged()["model"], outcomes.overlap()


def check(task: Task) -> None:
    """End the benchmark where the lists, with nothing masked, are not those of the bare product."""
    few = slice(0, 200)
    none = np.zeros(201, np.int64), np.empty(0, np.int64)
    ours = rank_block(task.queries[few], task.vectors, *none, K)
    theirs = bare(torch.from_numpy(task.queries[few]), torch.from_numpy(task.vectors), 64)
    # Scores that differ in their last bits may change places.
    if (ours != theirs).mean() > 0.001:
        raise SystemExit(f"{(ours != theirs).sum()} of {ours.size} places differ from the bare product's")


def main() -> None:
    """Measure, print and write."""
    quick = measure.start(__doc__ or "", threads=1)
    task = Task(1_500, 5_000) if quick else Task(USERS, ITEMS)
    check(task)
    queries, vectors = torch.from_numpy(task.queries), torch.from_numpy(task.vectors)
    limits = {f"bare, {block} queries at once": block for block in BLOCKS}
    held = task.held
    callables = {
        "evaluate": lambda: evaluate(task),
        "its ranking": lambda: task.rank(0, held, K),
        **{name: lambda block=block: bare(queries, vectors, block) for name, block in limits.items()},
    }
    samples = measure.times(callables, 2 if quick else 4)
    fastest = min(limits, key=lambda name: samples[name].median)
    result = evaluate(task)[0].result()
    figures = {
        "evaluate_over_bare": samples["evaluate"].over(samples[fastest]),
        "rank_over_bare": samples["its ranking"].over(samples[fastest]),
        "users_per_second": len(held) / samples["evaluate"].median,
    }
    facts = (
        f"{len(held):,} users x {len(vectors):,} items, d = {DIM}, k = {K}, {len(held.masked_rows):,} masked"
    )
    table = [(facts, "time")] + [(name, sample) for name, sample in samples.items()]
    table.append((f"recall@{K} {result[f'recall@{K}']:.4f}, coverage@{K} {result[f'coverage@{K}']:.3f}", ""))
    measure.finish("evaluate", figures, table, quick)


def _unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _starts(user: NDArray[np.int64], users: int) -> NDArray[np.int64]:
    counts = np.bincount(user, minlength=users)
    return np.cumsum(counts) - counts


def _compressed(
    user: NDArray[np.int64], row: NDArray[np.int64], chosen: NDArray[np.bool_], users: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets [users + 1] and the rows of the chosen pairs, which are in the order of users, ascending."""
    order = np.lexsort((row[chosen], user[chosen]))
    counts = np.bincount(user[chosen], minlength=users)
    return np.concatenate([[0], np.cumsum(counts)]), row[chosen][order]


if __name__ == "__main__":
    main()

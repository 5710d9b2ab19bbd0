"""Is a new generation about as good as the one in use? A gate against breakage, not a choice of models.

Both answer for users of the new dataset's test split, each as it would be served: its own towers, shards and
effort. A query brings along what it knows by ``data.knowledge``, so that neither answers from the user's
later interactions, and only items that both can answer are asked for and counted.

It is no fair contest: a generation that was fitted on everything (``train.fit: all``) has learned from the
held-out interactions, one that is older has not, or from fewer of them. That favours the newer one, as it
should be: a refusal then means that something broke, a feature that is always missing or half of a catalogue,
and not that chance went the other way. Which model is better is what ``python -m jobs.evaluate`` says.

Symbols: K results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.dataset import Dataset
from twotower.data.knowledge import Repeats, Rules, holdout, known
from twotower.generations.generation import Generation
from twotower.retrieval.query import HistoryItem, Query
from twotower.retrieval.retriever import Retriever
from twotower.schema import KINDS

_MAX_USERS = 1_000
_LEAST_USERS = 20
"""Fewer users say nothing about a share of a recall."""
_HISTORY = 200
_BATCH = 128


@dataclass(frozen=True)
class Comparison:
    """Recall at K of two generations for the same users, over the same items."""

    current: str
    """Id of the generation in use."""
    k: int
    num_users: int
    num_items: int
    """Items that both can answer."""
    recall: float
    """Mean share of a user's held-out items that are among the K answers, of the new generation."""
    current_recall: float
    """The same of the generation in use."""

    def describe(self) -> str:
        """Return it as one line."""
        return (
            f"recall@{self.k} of {self.num_users:,} test users over {self.num_items:,} common items: "
            f"{self.recall:.4f}, of {self.current} in use {self.current_recall:.4f}"
        )

    def reason_against(self, max_drop: float) -> str | None:
        """Return why the new generation is not to be published, a sentence; None when it may be.

        Args:
            max_drop: the share of the recall in use that may be lost, in [0, 1].
        """
        # What floating point makes of a drop that is just allowed is allowed.
        if self.current_recall - self.recall <= max_drop * self.current_recall + 1e-9:
            return None
        lost = 1 - self.recall / self.current_recall
        return (
            f"its {self.describe()}: it loses {lost:.1%}, index.max_recall_drop allows {max_drop:.1%}; look "
            "at what changed in data and training"
        )


def compare(
    dataset: Dataset, new: Path, current: Path, k: int, repeats: Repeats, seed: int
) -> Comparison | str:
    """Return the comparison of two generations, or why there is none, as the end of a sentence.

    Args:
        dataset: of the new generation; its test split is the truth.
        new: directory of the new generation.
        current: directory of the one in use.
        k: K, lowered to the number of common items.
        repeats: ``evaluation.repeats``.
        seed: of the draw of up to 1,000 users.

    Raises:
        ArtefactError: a generation can not be opened.
    """
    generations = [Generation.open(path, verify=False) for path in (new, current)]
    answerable = [_answerable(generation) for generation in generations]
    common = answerable[0].filter(pc.is_in(answerable[0], value_set=answerable[1]))
    if len(common) == 0:
        return f"it has no item in common with {current.name}"
    # All items of both need no list.
    allowed = None if len(common) == len(answerable[0]) == len(answerable[1]) else common.to_pylist()
    k = min(k, len(common))
    cases = list(_cases(dataset, common, k, allowed, repeats, seed))
    if len(cases) < _LEAST_USERS:
        return (
            f"{len(cases)} users of the test split have new items that both know, {_LEAST_USERS} are needed"
        )
    first, second = (_recall(Retriever(generation), cases) for generation in generations)
    return Comparison(generations[1].id, k, len(cases), len(common), first, second)


@dataclass(frozen=True)
class _Case:
    """A user's question, and the held-out items that answer it."""

    query: Query
    wanted: frozenset[str]


def _answerable(generation: Generation) -> pa.StringArray:
    """Return the ids of the items that a generation can answer."""
    return generation.item_ids.array.take(pa.array(generation.answerable_rows()))


def _cases(
    dataset: Dataset,
    common: pa.StringArray,
    k: int,
    allowed: list[str] | None,
    repeats: Repeats,
    seed: int,
) -> Iterator[_Case]:
    """Yield up to 1,000 users with common items that are relevant in the test split."""
    log, ids = dataset.interactions, dataset.item_ids
    rules = Rules.of(dataset, repeats)
    held = holdout(log, "test", rules)
    is_common = np.asarray(pc.is_in(ids.array, value_set=common).to_numpy(zero_copy_only=False))
    liked = known(log, "test", rules) & (log.kind == KINDS["positive"])
    yielded = 0
    for q in np.random.default_rng([seed, 4]).permutation(len(held)).tolist():
        case = held.part(q, q + 1)
        wanted = case.relevant_rows[is_common[case.relevant_rows]]
        if len(wanted) == 0:
            continue
        user = int(case.user_rows[0])
        rows = np.arange(log.user_offsets[user], log.user_offsets[user + 1])
        rows = rows[liked[rows]][-_HISTORY:]
        history = [
            HistoryItem(item, weight=float(weight))
            for item, weight in zip(ids.ids(log.item_row[rows]), log.weight[rows], strict=True)
        ]
        query = Query(
            k=k,
            user_id=dataset.user_ids.id(user),
            history=history,
            exclude_seen=False,
            exclude_items=ids.ids(case.masked_rows),
            allow_items=allowed,
        )
        yield _Case(query, frozenset(ids.ids(wanted)))
        yielded += 1
        if yielded == _MAX_USERS:
            return


def _recall(retriever: Retriever, cases: Sequence[_Case]) -> float:
    shares: list[float] = []
    for start in range(0, len(cases), _BATCH):
        batch = cases[start : start + _BATCH]
        answers = retriever.retrieve_batch([case.query for case in batch])
        for case, answer in zip(batch, answers, strict=True):
            found = {item["item_id"] for item in answer.items}
            shares.append(len(found & case.wanted) / len(case.wanted))
    return float(np.mean(shares))

"""Questions to a generation whose answers can be checked, asked before it answers anybody.

Hashes say that files are as they were written, not that what was written makes sense. Known users and
histories are asked for items, and some items are encoded again: each must be the one whose vector the index
holds for it, and a search must find what scores at least as high.

Symbols: m items, D embedding_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from twotower.errors import ArtefactError, RequestError
from twotower.generations.yielding import pause
from twotower.retrieval.front import Front
from twotower.retrieval.query import Answer, HistoryItem, Query, UnknownItemError

FloatArray = npt.NDArray[np.float32]
_K = 10
_USERS = 4
_LOOKED_AT = 4_096
"""Users among whom those with a history are looked for."""
_HISTORY = 5
_ITEMS = 32
_SHARE = 0.5
"""Least share of the items that must be found again: an approximate index may round or miss some."""
_TOLERANCE = 1e-3
_SEARCHED = 4
"""Items that are searched for at a time."""


def check_answers(front: Front, answer: Callable[[Query], Answer]) -> None:
    """Ask for the items of known users, of histories and of nobody, and check what is answered.

    Args:
        front: of the generation.
        answer: gives its answers.

    Raises:
        ArtefactError: an answer is none, or makes no sense.
    """
    for query in _queries(front):
        pause()
        what = "nobody" if query.history is None and query.user_id is None else "a history"
        what = "a known user" if query.user_id is not None else what
        try:
            items = answer(query).items
            _check_items(front, items, _num_wanted(front, query))
        except (RequestError, ArtefactError) as error:
            raise ArtefactError(f"the canary query of {what} failed: {error}") from None


def check_vectors(
    encoded: FloatArray, stored: FloatArray, search: Callable[[FloatArray], FloatArray]
) -> None:
    """Check that an index holds the vectors of its items, and finds them.

    Args:
        encoded: [m, D] what the item tower gives for some items.
        stored: [m, D] what the index holds for them.
        search: gives the best score [m] that is found with each of some vectors, -inf where nothing is.

    Raises:
        ArtefactError: it does not.
    """
    if not (np.isfinite(encoded).all() and np.isfinite(stored).all()):
        raise ArtefactError("vectors of items hold NaN or infinity")
    distances = ((encoded[:, None, :] - stored[None, :, :]) ** 2).sum(axis=2)
    own = np.diagonal(distances)
    # Items with equal features have equal vectors.
    share = float(np.mean(own <= distances.min(axis=1) + _TOLERANCE)) if len(own) else 1.0
    if share < _SHARE:
        raise ArtefactError(
            f"only {share:.0%} of {len(own)} items have, in the index, the vector that the item tower gives "
            "them: its vectors are those of other items or of another tower"
        )
    scores = np.einsum("md,md->m", encoded, stored)
    best = np.empty_like(scores)
    for begin in range(0, len(encoded), _SEARCHED):
        pause()
        best[begin : begin + _SEARCHED] = search(encoded[begin : begin + _SEARCHED])
    found = best >= scores - _TOLERANCE * np.maximum(1, np.abs(scores))
    if len(found) and found.mean() < _SHARE:
        raise ArtefactError(f"a search finds only {found.mean():.0%} of {len(found)} items by their vectors")


def sampled_rows(front: Front) -> npt.NDArray[np.int64]:
    """Return the item rows to look at: spread over all that can be answered, and some of updates."""
    rows = front.answerable
    spread = rows[np.linspace(0, len(rows) - 1, min(_ITEMS, len(rows))).astype(np.int64)]
    return np.unique(np.concatenate([spread, front.generation.delta_rows[-_ITEMS // 4 :]]))


def _queries(front: Front) -> Iterator[Query]:
    generation = front.generation
    histories, item_ids = generation.histories, generation.item_ids
    lengths = np.diff(histories.offsets[: _LOOKED_AT + 1])
    for row in np.flatnonzero(lengths)[:_USERS].tolist():
        user_id = generation.user_ids.id(row)
        yield Query(k=_K, user_id=user_id)
        yield Query(k=_K, user_id=user_id, exclude_seen=False)
        begin, end = int(histories.offsets[row]), int(histories.offsets[row + 1])
        ids = item_ids.ids(histories.item_rows[max(begin, end - _HISTORY) : end])
        yield Query(k=_K, history=[HistoryItem(i) for i in ids], exclude_seen=False)
    yield Query(k=_K)


def _num_wanted(front: Front, query: Query) -> int:
    """Return how many items must be answered."""
    count = len(front.answerable)
    row = None if query.user_id is None else front.generation.user_ids.row(query.user_id)
    if row is not None and query.exclude_seen:
        count -= int(np.isin(front.generation.seen(row), front.answerable).sum())
    return min(query.k, count)


def _check_items(front: Front, items: list[dict[str, object]], wanted: int) -> None:
    if len(items) != wanted:
        raise ArtefactError(f"{len(items)} items were answered instead of {wanted}")
    scores = np.array([item["score"] for item in items], np.float64)
    if not np.isfinite(scores).all():
        raise ArtefactError("a score is NaN or infinity")
    if (np.diff(scores) > 0).any():
        raise ArtefactError("the scores do not fall")
    ids = [str(item["item_id"]) for item in items]
    if len(set(ids)) < len(ids):
        raise ArtefactError("an item was answered twice")
    for item_id in ids:
        try:
            front.row_of(item_id)
        except UnknownItemError as error:
            raise ArtefactError(error.message) from None

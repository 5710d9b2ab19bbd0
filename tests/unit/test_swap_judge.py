"""What the swap benchmark takes for an answer of two generations."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from benchmarks.swap import MIXED, Known

KNOWN = {"old": [["a1", "a2"], ["a3"]], "new": [["b1", "b2"], ["b3"]]}
SCORES = {"old": [[0.9, 0.5], [0.25]], "new": [[0.8, 0.7], [0.125]]}


def answer(generation: str, ids: list[str], scores: list[float]) -> bytes:
    items: list[dict[str, Any]] = [{"item_id": i, "score": s} for i, s in zip(ids, scores, strict=True)]
    return orjson.dumps({"generation": generation, "items": items})


def test_the_known_answers_of_either_generation_are_right():
    known = Known(KNOWN, SCORES)
    assert known.judge(0, 200, answer("old", ["a1", "a2"], [0.9, 0.5])) is None
    assert known.judge(1, 200, answer("new", ["b3"], [0.125_000_5])) is None
    assert known.judge(1, 200, answer("new", ["b3"], [0.125])) is None
    assert known.answered == {"old": 1, "new": 2}


@pytest.mark.parametrize(
    ("number", "content"),
    [
        (0, answer("new", ["a1", "a2"], [0.9, 0.5])),
        (0, answer("old", ["b1", "b2"], [0.8, 0.7])),
        (0, answer("old", ["a1", "b2"], [0.9, 0.7])),
        (0, answer("old", ["a2", "a1"], [0.9, 0.5])),
        (0, answer("old", ["a1"], [0.9])),
        (0, answer("old", [], [])),
        (1, answer("old", ["a1", "a2"], [0.9, 0.5])),
        # The query tower of one and the shards of the other.
        (0, answer("old", ["a1", "a2"], [0.9, 0.4])),
        (0, answer("third", ["a1", "a2"], [0.9, 0.5])),
    ],
)
def test_anything_else_is_not(number, content):
    known = Known(KNOWN, SCORES)
    assert known.judge(number, 200, content) == MIXED
    assert not known.answered


def test_a_failed_request_is_no_mixed_answer():
    known = Known(KNOWN, SCORES)
    assert known.judge(0, 503, b"busy") is None
    assert not known.answered

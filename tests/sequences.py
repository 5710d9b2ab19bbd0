"""Configurations with a sequence encoder, and its maths as loops in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config import Config, parse_config

Weights = dict[str, npt.NDArray[np.float64]]
TRANSFORMER: dict[str, Any] = {
    "pooling": "transformer",
    "transformer": {"blocks": 2, "heads": 2, "feed_forward": 3, "dropout": 0.3, "time_gaps": True},
}
ATTENTION: dict[str, Any] = {"pooling": "attention"}


def with_history(config: Config, **changes: Any) -> Config:
    """Return a configuration with other values in its history feature."""
    values = copy.deepcopy(config.to_json())
    for feature in values["features"]["query"]:
        if feature["type"] == "history":
            feature |= changes
    return parse_config(values)


def attention_pooling(weights: Weights, items: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the embedding [E] of a history [n, E], oldest first, as the documentation has it."""
    if not len(items):
        return weights["nothing"]
    logits = []
    for steps_before_latest, item in enumerate(items[::-1]):
        logits.append(_normalised(item) @ weights["query"] + weights["distance"][steps_before_latest])
    shares = np.exp(np.array(logits) - max(logits))
    total = np.zeros(items.shape[1])
    for share, item in zip(shares / shares.sum(), items[::-1], strict=True):
        total += share * item
    return total


def transformer(
    weights: Weights, items: npt.NDArray[np.float64], heads: int, times: list[int | None] | None = None
) -> npt.NDArray[np.float64]:
    """Return the embedding [E] of a history [n, E], oldest first, one item and head at a time."""
    final = weights["norm.weight"], weights["norm.bias"]
    if not len(items):
        return _normalised(weights["nothing"]) * final[0] + final[1]
    states = [item + weights["positions"][place] for place, item in enumerate(items)]
    if times is not None:
        states = [x + weights["gaps"][gap_class(times, place)] for place, x in enumerate(states)]
    block = 0
    while f"blocks.{block}.attention_in.weight" in weights:
        layer = {k.removeprefix(f"blocks.{block}."): v for k, v in weights.items()}
        states = _block(layer, states, heads)
        block += 1
    return _normalised(states[-1]) * final[0] + final[1]


def gap_class(times: list[int | None], place: int) -> int:
    """Return the class of the time, in microseconds, between an item and the one before it."""
    now, before = times[place], times[place - 1] if place else None
    if now is None or before is None:
        return 0
    seconds = max(now - before, 0) // 1_000_000
    for found in range(1, 34):
        if seconds < 2**found - 1:
            return found
    return 33


def _block(
    layer: Weights, states: list[npt.NDArray[np.float64]], heads: int
) -> list[npt.NDArray[np.float64]]:
    width = len(states[0])
    each = width // heads
    mixed = [_linear(layer, "attention_in", _norm(layer, "attention_norm", x)) for x in states]
    out = []
    for place, x in enumerate(states):
        seen = np.empty(width)
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            query = mixed[place][:width][part]
            logits = [query @ mixed[j][width : 2 * width][part] / math.sqrt(each) for j in range(place + 1)]
            shares = np.exp(np.array(logits) - max(logits))
            shares /= shares.sum()
            seen[part] = sum(shares[j] * mixed[j][2 * width :][part] for j in range(place + 1))
        x = x + _linear(layer, "attention_out", seen)
        hidden = _linear(layer, "feed_forward_in", _norm(layer, "feed_forward_norm", x))
        gelu = np.array([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden])
        out.append(x + _linear(layer, "feed_forward_out", gelu))
    return out


def _normalised(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)


def _norm(layer: Weights, name: str, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return _normalised(x) * layer[f"{name}.weight"] + layer[f"{name}.bias"]


def _linear(layer: Weights, name: str, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return layer[f"{name}.weight"] @ x + layer[f"{name}.bias"]

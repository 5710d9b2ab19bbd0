"""The losses of ``train.loss.kind`` as loops over queries and candidates in float64, from the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.parity.loss_oracle import compare_with_dense
from twotower.config.losses import LossConfig
from twotower.model.losses import GlobalBatch, choose_loss

NUM_ITEMS = 57
LOG_Q = 0.8
"""Strength of the correction that ``log_q_C`` of a case has."""


@dataclass
class Query:
    """What a query's loss is made of."""

    positive: Tensor
    """Score over the temperature."""
    log_q: Tensor
    """Of the positive."""
    negatives: list[tuple[Tensor, Tensor]]
    """Score over the temperature, and log_q."""
    weight: Tensor


def queries_of(case: dict[str, Any]) -> dict[int, Query]:
    """Return the queries with a weight by their number."""
    queries, candidates, ids = case["queries_QD"], case["candidates_CD"], case["candidate_ids_C"].tolist()
    temperature, log_q = case["temperature"], case["log_q_C"].double()
    known, own, own_log_q = case.get("known"), case.get("own_QHD"), case.get("own_log_q_QH")
    found = {}
    for q, p in enumerate(case["positive_Q"].tolist()):
        if case["weight_Q"][q] == 0:
            continue
        keys = set()
        if known is not None:
            keys = set(known.keys[int(known.offsets[q]) : int(known.offsets[q + 1])].tolist())
        negatives = []
        for c, item in enumerate(ids):
            accidental = case["mask_accidental_hits"] and item == ids[p]
            had = known is not None and int(known.candidate_keys[c]) in keys
            if c != p and item >= 0 and not accidental and not had:
                negatives.append(((queries[q] * candidates[c]).sum() / temperature, log_q[c]))
        for h in range(0 if own is None else own.shape[1]):
            if own_log_q[q, h] < math.inf:
                score = (queries[q] * own[q, h]).sum() / temperature
                negatives.append((score, own_log_q[q, h].double()))
        positive = (queries[q] * candidates[p]).sum() / temperature
        found[q] = Query(positive, log_q[p], negatives, case["weight_Q"][q].double())
    return found


def bilateral(case: dict[str, Any], users: list[int], ratio: float, power: float) -> Tensor:
    """The loss of Wu et al., with a log-sum over negatives and a power of it."""
    total, queries = torch.zeros((), dtype=torch.float64), queries_of(case)
    for q, query in queries.items():
        mine = [other for i, other in queries.items() if users[i] == users[q]]
        mean = sum(other.weight * (other.positive / ratio).exp() for other in mine)
        mean = mean / sum(other.weight for other in mine)
        loss = -ratio * torch.log(mean)
        if query.negatives:
            loss = loss + power * torch.log(sum((z - log_q).exp() for z, log_q in query.negatives))
        total = total + query.weight * loss
    return total


def binary(case: dict[str, Any], calibration: float, offset: float) -> Tensor:
    """The loss of Petrov and Macdonald, negatives weighted by the sampling rate over their own."""
    total = torch.zeros((), dtype=torch.float64)
    alpha = (int((case["candidate_ids_C"] >= 0).sum()) - 1) / (NUM_ITEMS - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    for query in queries_of(case).values():
        loss = -torch.log(torch.sigmoid(query.positive + offset) ** beta)
        for z, log_q in query.negatives:
            count = (alpha / torch.exp(log_q / LOG_Q)) ** LOG_Q
            loss = loss - count * torch.log(1 - torch.sigmoid(z + offset))
        total = total + query.weight * loss
    return total


def top_k(case: dict[str, Any], k: int, width: float) -> Tensor:
    """The loss of Yang et al., with the k-th highest score by sorting."""
    total = torch.zeros((), dtype=torch.float64)
    for query in queries_of(case).values():
        t = case["temperature"].item()
        positive = query.positive.item() * t
        scores = sorted([positive, *(z.item() * t for z, _ in query.negatives)], reverse=True)
        share = 1 / (1 + math.exp(-(positive - scores[k - 1]) / width)) if len(scores) >= k else 1.0
        own = query.positive - query.log_q
        logits = [own, *(z - log_q for z, log_q in query.negatives)]
        total = total + query.weight * share * (torch.logsumexp(torch.stack(logits), 0) - own)
    return total


def settings_of(kind: str, **values: Any) -> LossConfig:
    """Return the section of a kind with its own settings."""
    own = {kind: values} if values else {}
    return LossConfig.model_validate({"kind": kind, "learn_temperature": False, "log_q": LOG_Q, **own})


def make_whole(case: dict[str, Any], users: Tensor, num_items: int = NUM_ITEMS) -> GlobalBatch:
    """Return the global batch of a single rank."""
    return GlobalBatch(users, case["weight_Q"], 0, lambda x: x, num_items)


Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def pair(kind: str, users: Tensor, **values: Any) -> Pair:
    """Return a loss and its loop, both of the inputs of ``make_case``."""
    settings = settings_of(kind, **values)
    loss = choose_loss(settings)

    def ours(**case: Any) -> Tensor:
        case = {"own_QHD": None, "own_log_q_QH": None, "known": None} | case
        return loss(**case, whole=lambda: make_whole(case, users.to(case["weight_Q"].device)))

    def loop(**case: Any) -> Tensor:
        if kind == "bsl":
            bsl = settings.bsl
            return bilateral(case, users.tolist(), bsl.positive_temperature, bsl.negative_power)
        if kind == "bce":
            return binary(case, settings.bce.calibration, settings.bce.offset)
        return top_k(case, settings.slatk.k, settings.slatk.width)

    return ours, loop


def compare_kind(kind: str, case: dict[str, Any], relative: float = 1e-5, **values: Any) -> float:
    """Compare a loss with its loop; users have one to some queries. Return the smallest gradient's norm."""
    users = torch.arange(len(case["weight_Q"])) % max(2, len(case["weight_Q"]) * 2 // 3)
    users[case["weight_Q"] == 0] = -1
    loss, loop = pair(kind, users, **values)
    return compare_with_dense(case, relative=relative, loss=loss, dense=loop)

"""The in-batch softmax as a dense float64 matrix: torch's cross_entropy on logits with -inf written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.losses import Known, in_batch_softmax

INPUTS = ("queries_QD", "candidates_CD", "temperature", "own_QHD")


def make_case(
    seed: int, num_queries: int, num_candidates: int, dim: int, num_own: int, padding: int, known: int
) -> dict[str, Any]:
    """Make float32 inputs with repeated items, padding on both sides and up to ``known`` keys a query.

    Padding queries have a padding candidate as their positive. Some known keys are not in the batch.
    """
    g = torch.Generator().manual_seed(seed)
    real = num_candidates - padding
    ids = torch.randint(0, max(1, num_candidates // 2), (num_candidates,), generator=g)
    ids[real:] = -1
    positive = torch.randint(0, real, (num_queries,), generator=g)
    weight = torch.rand(num_queries, generator=g) + 0.1
    num_padding_queries = min(padding, num_queries - 1)
    weight[num_queries - num_padding_queries :] = 0
    positive[num_queries - num_padding_queries :] = num_candidates - 1
    counts = torch.randint(0, known + 1, (num_queries,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    own_log_q = torch.randn(num_queries, num_own, generator=g)
    own_log_q[torch.rand(own_log_q.shape, generator=g) < 0.3] = torch.inf
    return {
        "queries_QD": F.normalize(torch.randn(num_queries, dim, generator=g), dim=1),
        "candidates_CD": F.normalize(torch.randn(num_candidates, dim, generator=g), dim=1),
        "temperature": torch.tensor(0.13),
        "own_QHD": F.normalize(torch.randn(num_queries, num_own, dim, generator=g), dim=2),
        "own_log_q_QH": own_log_q,
        "positive_Q": positive,
        "log_q_C": torch.randn(num_candidates, generator=g),
        "candidate_ids_C": ids,
        "weight_Q": weight,
        "mask_accidental_hits": True,
        "known": Known(offsets, torch.randint(0, num_candidates, (int(offsets[-1]),), generator=g), ids + 1),
    }


def dense_loss(
    *,
    queries_QD: Tensor,
    candidates_CD: Tensor,
    temperature: Tensor,
    positive_Q: Tensor,
    log_q_C: Tensor,
    candidate_ids_C: Tensor,
    weight_Q: Tensor,
    mask_accidental_hits: bool,
    known: Known | None = None,
    own_QHD: Tensor | None = None,
    own_log_q_QH: Tensor | None = None,
) -> Tensor:
    """Return the loss in float64, row by row over queries with a weight."""
    total = torch.zeros((), dtype=torch.float64)
    for q, p in enumerate(positive_Q.tolist()):
        if weight_Q[q] == 0:
            continue
        logits = candidates_CD.double() @ queries_QD[q].double() / temperature.double() - log_q_C.double()
        left_out = torch.zeros(len(logits), dtype=torch.bool)
        if mask_accidental_hits:
            left_out |= candidate_ids_C == candidate_ids_C[p]
        if known is not None:
            keys = known.keys[int(known.offsets[q]) : int(known.offsets[q + 1])]
            left_out |= torch.isin(known.candidate_keys, keys)
        left_out[p] = False
        left_out |= candidate_ids_C == -1
        logits = logits.masked_fill(left_out, -torch.inf)
        if own_QHD is not None and own_log_q_QH is not None:
            own = own_QHD[q].double() @ queries_QD[q].double() / temperature.double()
            logits = torch.cat([logits, own - own_log_q_QH[q].double()])
        total = total + F.cross_entropy(logits, torch.tensor(p)) * weight_Q[q].double()
    return total


def assert_equals_dense(case: dict[str, Any], device: str = "cpu", relative: float = 1e-5) -> None:
    """Compare the loss and the gradients (norm of the difference over norm), none of which may be tiny."""
    smallest = compare_with_dense(case, device, relative)
    assert smallest > 1e-3, "an input has hardly a gradient, so nothing is compared"


def compare_with_dense(
    case: dict[str, Any],
    device: str = "cpu",
    relative: float = 1e-5,
    loss: Callable[..., Tensor] = in_batch_softmax,
    dense: Callable[..., Tensor] = dense_loss,
) -> float:
    """Compare the loss and the gradients with the dense ones; return the smallest norm of a gradient."""
    names = [name for name in INPUTS if case.get(name) is not None and case[name].numel()]
    dense_inputs = {name: case[name].double().clone().requires_grad_() for name in names}
    wanted = dense(**case | dense_inputs)
    wanted.backward()
    there = {name: x.to(device) if torch.is_tensor(x) else x for name, x in case.items()}
    known = case.get("known")
    if known is not None:
        there["known"] = Known(*(x.to(device) for x in (known.offsets, known.keys, known.candidate_keys)))
    inputs = {name: there[name].clone().requires_grad_() for name in names}
    without_gradients = loss(**there)
    found = loss(**there | inputs)
    found.backward()
    assert abs(found.item() - wanted.item()) < relative * max(1.0, abs(wanted.item()))
    assert abs(without_gradients.item() - wanted.item()) < relative * max(1.0, abs(wanted.item()))
    norms = []
    for name in names:
        grad, reference = inputs[name].grad, dense_inputs[name].grad
        assert grad is not None
        if reference is None:  # a loop over own negatives of which none is there
            reference = torch.zeros_like(dense_inputs[name])
        distance, norm = (grad.cpu().double() - reference).norm().item(), reference.norm().item()
        # What pulls at the temperature is a difference of sums that are larger by far.
        floor = 1.0 if name == "temperature" else 0.1
        assert distance <= relative * max(norm, floor), f"{name}: {distance:.1e} of {norm:.1e}"
        norms.append(norm)
    return min(norms)

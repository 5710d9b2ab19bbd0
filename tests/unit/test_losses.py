"""The in-batch softmax against a loop over queries and candidates, and by the effect of each of its parts."""

import math

import pytest
import torch
import torch.nn.functional as F

from twotower.model.losses import in_batch_softmax

Q, C, D = 5, 9, 4


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "queries_QD": F.normalize(torch.randn(Q, D, generator=g), dim=1),
        "candidates_CD": F.normalize(torch.randn(C, D, generator=g), dim=1),
        "positive_Q": torch.tensor([2, 3, 4, 5, 6]),
        "temperature": torch.tensor(0.2),
        "log_q_C": torch.randn(C, generator=g),
        "candidate_ids_C": torch.tensor([10, 11, 12, 13, 12, 14, 15, 13, 16]),
        "candidate_valid_C": torch.tensor([True] * 8 + [False]),
    }


def loop(b: dict[str, torch.Tensor], mask: bool) -> list[float]:
    out = []
    for q in range(Q):
        p = int(b["positive_Q"][q])
        total = 0.0
        for c in range(C):
            if not b["candidate_valid_C"][c]:
                continue
            if mask and c != p and b["candidate_ids_C"][c] == b["candidate_ids_C"][p]:
                continue
            score = float(b["queries_QD"][q] @ b["candidates_CD"][c])
            logit = score / 0.2 - float(b["log_q_C"][c])
            total += math.exp(logit)
            if c == p:
                own = logit
        out.append(math.log(total) - own)
    return out


@pytest.mark.parametrize("mask", [True, False])
def test_equals_the_loop(mask: bool) -> None:
    b = batch()
    assert in_batch_softmax(**b, mask_accidental_hits=mask).tolist() == pytest.approx(loop(b, mask), rel=1e-5)
    assert loop(b, True) != pytest.approx(loop(b, False))


def test_masking_equals_deleting_the_column() -> None:
    b = batch()
    masked = in_batch_softmax(**b, mask_accidental_hits=True)[0]  # positive 2 has id 12, as column 4 has
    keep = torch.arange(C) != 4
    cut = {
        **b,
        **{k: b[k][keep] for k in ("candidates_CD", "log_q_C", "candidate_ids_C", "candidate_valid_C")},
    }
    cut |= {"queries_QD": b["queries_QD"][:1], "positive_Q": b["positive_Q"][:1]}
    assert masked.item() == pytest.approx(
        in_batch_softmax(**cut, mask_accidental_hits=False).item(), rel=1e-6
    )


def test_a_constant_in_log_q_changes_nothing_and_a_single_one_does() -> None:
    b = batch()
    plain = in_batch_softmax(**b, mask_accidental_hits=True)
    shifted = in_batch_softmax(**{**b, "log_q_C": b["log_q_C"] + 3.5}, mask_accidental_hits=True)
    torch.testing.assert_close(plain, shifted)
    # The sign of logQ: a candidate that is drawn more often counts less as a negative.
    more_frequent = b["log_q_C"].clone()
    more_frequent[0] += 1
    assert (in_batch_softmax(**{**b, "log_q_C": more_frequent}, mask_accidental_hits=True) < plain).all()


def test_doubling_every_candidate_adds_log_2() -> None:
    b = batch()
    twice = {**b, **{k: torch.cat([b[k], b[k]]) for k in ("candidates_CD", "log_q_C", "candidate_valid_C")}}
    twice["candidate_ids_C"] = torch.arange(2 * C)
    once = in_batch_softmax(**{**b, "candidate_ids_C": torch.arange(C)}, mask_accidental_hits=True)
    difference = in_batch_softmax(**twice, mask_accidental_hits=True) - once
    torch.testing.assert_close(difference, torch.full((Q,), math.log(2)), rtol=1e-5, atol=1e-5)


def test_padding_has_no_weight_and_no_gradient() -> None:
    b = batch()
    candidates = b["candidates_CD"].clone().requires_grad_()
    in_batch_softmax(**{**b, "candidates_CD": candidates}, mask_accidental_hits=True).sum().backward()
    assert candidates.grad is not None
    assert (candidates.grad[8] == 0).all()
    assert (candidates.grad[:8].abs().sum(1) > 0).all()


def test_known_positives_have_no_gradient_and_the_positive_itself_stays() -> None:
    b = batch()
    candidates = b["candidates_CD"].clone().requires_grad_()
    known = torch.zeros(Q, C, dtype=torch.bool)
    known[:, 7] = True
    known[torch.arange(Q), b["positive_Q"]] = True  # a user's own positive is known too
    losses = in_batch_softmax(
        **{**b, "candidates_CD": candidates}, mask_accidental_hits=False, known_QC=known
    )
    losses.sum().backward()
    assert losses.isfinite().all()
    assert candidates.grad is not None
    assert (candidates.grad[7] == 0).all()
    assert (candidates.grad[2:7].abs().sum(1) > 0).all()

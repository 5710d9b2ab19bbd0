"""What each part of the in-batch softmax does, seen by its effect on the loss and the gradients."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from twotower.model import loss_masks
from twotower.model.losses import Known, blocks, in_batch_softmax

Q, C, D, H = 5, 9, 4, 3


def batch(seed: int = 0, **changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "queries_QD": F.normalize(torch.randn(Q, D, generator=g), dim=1),
        "candidates_CD": F.normalize(torch.randn(C, D, generator=g), dim=1),
        "positive_Q": torch.tensor([2, 3, 4, 5, 6]),
        "temperature": torch.tensor(0.2),
        "log_q_C": torch.randn(C, generator=g),
        "candidate_ids_C": torch.tensor([10, 11, 12, 13, 12, 14, 15, 13, -1]),
        "weight_Q": torch.ones(Q),
        "mask_accidental_hits": False,
    } | changes


def gradients(b: dict[str, Any], *names: str) -> list[torch.Tensor]:
    inputs = [b[name].clone().requires_grad_() for name in names]
    in_batch_softmax(**b | dict(zip(names, inputs, strict=True))).backward()
    return [x.grad for x in inputs if x.grad is not None]


def every_key(keys: list[int], candidate_keys: torch.Tensor) -> Known:
    """All queries know the same keys."""
    offsets = torch.arange(Q + 1) * len(keys)
    return Known(offsets, torch.tensor(keys * Q), candidate_keys)


@pytest.mark.parametrize("mask", [True, False])
def test_equals_a_loop_over_queries_and_candidates(mask: bool) -> None:
    b = batch(mask_accidental_hits=mask)
    ids = b["candidate_ids_C"].tolist()
    wanted = 0.0
    for q in range(Q):
        p = q + 2
        logits = {
            c: float(b["queries_QD"][q] @ b["candidates_CD"][c]) / 0.2 - float(b["log_q_C"][c])
            for c in range(C)
            if ids[c] != -1 and (c == p or not mask or ids[c] != ids[p])
        }
        wanted += math.log(sum(map(math.exp, logits.values()))) - logits[p]
    assert in_batch_softmax(**b).item() == pytest.approx(wanted, rel=1e-6)
    assert in_batch_softmax(**b).item() != pytest.approx(
        in_batch_softmax(**b | {"mask_accidental_hits": not mask}).item(), rel=1e-3
    )


def test_masking_equals_deleting_the_column() -> None:
    first = {
        "queries_QD": batch()["queries_QD"][:1],
        "positive_Q": torch.tensor([2]),
        "weight_Q": torch.ones(1),
    }
    masked = in_batch_softmax(
        **batch(**first, mask_accidental_hits=True)
    )  # column 4 has the item of column 2
    keep = torch.arange(C) != 4
    cut = {name: batch()[name][keep] for name in ("candidates_CD", "log_q_C", "candidate_ids_C")}
    assert masked.item() == pytest.approx(in_batch_softmax(**batch(**first, **cut)).item(), rel=1e-6)


def test_the_sign_of_log_q() -> None:
    b = batch()
    plain = in_batch_softmax(**b)
    torch.testing.assert_close(plain, in_batch_softmax(**b | {"log_q_C": b["log_q_C"] + 3.5}))
    # A candidate that is drawn more often counts less as a negative ...
    more_frequent = b["log_q_C"].clone()
    more_frequent[0] += 1
    assert in_batch_softmax(**b | {"log_q_C": more_frequent}) < plain
    # ... and its own queries, as positives, find it harder.
    more_frequent = b["log_q_C"].clone()
    more_frequent[2] += 1
    alone = {"weight_Q": torch.tensor([1.0, 0, 0, 0, 0])}
    assert in_batch_softmax(**b | alone | {"log_q_C": more_frequent}) > in_batch_softmax(**b | alone)


def test_log_q_stands_outside_the_temperature() -> None:
    # With equal scores only logQ is left, so the temperature must not matter.
    same = {"candidates_CD": torch.ones(C, D)}
    cold, warm = (in_batch_softmax(**batch(**same, temperature=torch.tensor(t))) for t in (0.05, 5.0))
    torch.testing.assert_close(cold, warm)
    assert cold.item() != pytest.approx(Q * math.log(C - 1), rel=1e-2)  # what no logQ at all would give


def test_doubling_every_candidate_adds_log_2() -> None:
    b = batch(candidate_ids_C=torch.arange(C), mask_accidental_hits=True)
    twice = {name: torch.cat([b[name], b[name]]) for name in ("candidates_CD", "log_q_C")}
    difference = in_batch_softmax(**b | twice | {"candidate_ids_C": torch.arange(2 * C)}) - in_batch_softmax(
        **b
    )
    assert difference.item() == pytest.approx(Q * math.log(2), rel=1e-5)


def test_padding_candidates_have_no_gradient_whatever_they_hold() -> None:
    b = batch()
    b["candidates_CD"][8] = 1e6
    b["log_q_C"][8] = math.nan
    (grad,) = gradients(b, "candidates_CD")
    assert (grad[8] == 0).all()
    assert (grad[:8].abs().sum(1) > 0).all()


def test_padding_queries_have_no_loss_and_no_gradient_even_where_everything_is_left_out() -> None:
    b = batch(own_QHD=torch.randn(Q, H, D), mask_accidental_hits=True)
    b["own_log_q_QH"] = torch.zeros(Q, H)
    b["own_log_q_QH"][4] = math.inf
    b["positive_Q"][4] = 8  # the padding candidate, and every other candidate is known
    b["known"] = every_key(list(range(C)), torch.arange(C))
    b["weight_Q"] = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    queries, candidates, temperature, own = gradients(
        b, "queries_QD", "candidates_CD", "temperature", "own_QHD"
    )
    assert (queries[4] == 0).all()
    assert (own[4] == 0).all()
    assert (queries[:4].abs().sum(1) > 0).all()
    assert (own[:4].abs().sum((1, 2)) > 0).all()
    assert candidates.isfinite().all()
    without = {
        name: b[name][:4] for name in ("queries_QD", "positive_Q", "weight_Q", "own_QHD", "own_log_q_QH")
    }
    without["known"] = Known(b["known"].offsets[:5], b["known"].keys[: 4 * C], b["known"].candidate_keys)
    wanted = gradients(b | without, "candidates_CD", "temperature")
    torch.testing.assert_close([candidates, temperature], wanted)


def test_known_candidates_have_no_gradient_and_the_positive_itself_stays() -> None:
    b = batch()
    keys = torch.tensor([70, 71, 72, 73, 74, 75, 76, 77, -1])
    # All queries know the candidate in column 7, one that is not in the batch, and their own positives.
    b["known"] = every_key([77, 999, 72, 73, 74, 75, 76, 77], keys)
    (grad,) = gradients(b, "candidates_CD")
    assert (grad[7] == 0).all()
    assert (grad[:7].abs().sum(1) > 0).all()
    assert in_batch_softmax(**b).isfinite()


def test_known_keys_that_are_not_in_the_batch_change_nothing() -> None:
    b = batch()
    absent = every_key([1, 999, -7], b["candidate_ids_C"])
    assert in_batch_softmax(**b | {"known": absent}) == in_batch_softmax(**b)
    nothing = Known(
        torch.zeros(Q + 1, dtype=torch.int64), torch.tensor([], dtype=torch.int64), absent.candidate_keys
    )
    assert in_batch_softmax(**b | {"known": nothing}) == in_batch_softmax(**b)


def test_own_negatives_equal_further_columns_of_that_query() -> None:
    # The trap: with columns gathered from ranks as positives and hard negatives in turn, labels that count
    # positives only point at hard negatives. Here they join no columns at all: the positive's column stays.
    b = batch(own_QHD=F.normalize(torch.randn(Q, H, D), dim=2), own_log_q_QH=torch.randn(Q, H))
    b["own_log_q_QH"][1, 0] = math.inf
    wanted = 0.0
    for q in range(Q):
        some = b["own_log_q_QH"][q].isfinite()
        one = {name: b[name][q : q + 1] for name in ("queries_QD", "positive_Q", "weight_Q")} | {
            "candidates_CD": torch.cat([b["candidates_CD"], b["own_QHD"][q, some]]),
            "log_q_C": torch.cat([b["log_q_C"], b["own_log_q_QH"][q, some]]),
            "candidate_ids_C": torch.cat([b["candidate_ids_C"], torch.arange(100, 100 + int(some.sum()))]),
        }
        wanted += in_batch_softmax(**batch(**one)).item()
    assert in_batch_softmax(**b).item() == pytest.approx(wanted, rel=1e-6)
    (grad,) = gradients(b, "own_QHD")
    assert (grad[1, 0] == 0).all()
    assert ((grad != 0).any(2).sum() == Q * H - 1).all()


def test_weights_are_those_of_single_queries() -> None:
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0])
    each = [in_batch_softmax(**batch(weight_Q=F.one_hot(torch.tensor(q), Q).float())) for q in range(Q)]
    wanted = sum(w * one for w, one in zip(weights, each, strict=True))
    torch.testing.assert_close(in_batch_softmax(**batch(weight_Q=weights)), wanted)


def test_far_apart_logits_neither_overflow_nor_vanish() -> None:
    # The positive's probability is exp(-400): not a float32, its logarithm is.
    b = batch(temperature=torch.tensor(0.005), log_q_C=torch.zeros(C))
    b["queries_QD"] = F.normalize(torch.ones(Q, D), dim=1)
    b["candidates_CD"] = F.normalize(torch.ones(C, D), dim=1)
    b["candidates_CD"][2] *= -1
    b["weight_Q"] = torch.tensor([1.0, 0, 0, 0, 0])
    assert in_batch_softmax(**b).item() == pytest.approx(400 + math.log(7), rel=1e-6)
    queries, candidates = gradients(b, "queries_QD", "candidates_CD")
    assert queries.isfinite().all()
    assert candidates[2].norm().item() == pytest.approx(200, rel=1e-5)


def test_backward_scales_by_the_incoming_gradient_and_can_run_twice() -> None:
    b = batch()
    b["queries_QD"].requires_grad_()
    (once,) = gradients(b, "candidates_CD")
    candidates = b["candidates_CD"].clone().requires_grad_()
    loss = in_batch_softmax(**b | {"candidates_CD": candidates}) * -3
    loss.backward(retain_graph=True)
    loss.backward()
    assert candidates.grad is not None
    torch.testing.assert_close(candidates.grad, -6 * once)


def test_the_same_inputs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(blocks, "_FEWEST_ROWS", 2)
    b = batch(own_QHD=torch.randn(Q, H, D), mask_accidental_hits=True)
    b["known"] = every_key([12, 15], b["candidate_ids_C"])
    names = ("queries_QD", "candidates_CD", "temperature", "own_QHD")
    for one, other in zip(gradients(b, *names), gradients(b, *names), strict=True):
        assert torch.equal(one, other)


def test_float64_by_numerical_differences() -> None:
    b = {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in batch().items()
    }
    b |= {"own_QHD": torch.randn(Q, H, D, dtype=torch.float64), "mask_accidental_hits": True}
    names = ("queries_QD", "candidates_CD", "temperature", "own_QHD")
    inputs = [b[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(lambda *x: in_batch_softmax(**b | dict(zip(names, x, strict=True))), inputs)


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    b = batch()
    half = {name: b[name].bfloat16() for name in ("queries_QD", "candidates_CD")}
    loss = in_batch_softmax(**b | half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, in_batch_softmax(**b | {name: x.float() for name, x in half.items()}))
    assert [g.dtype for g in gradients(b | half, "queries_QD", "candidates_CD")] == [torch.bfloat16] * 2


def test_autocast_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "fastest_linear", lambda x: F.linear)  # which autocast would change
    b = batch()
    plain = in_batch_softmax(**b), *gradients(b, "queries_QD", "candidates_CD")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = in_batch_softmax(**b), *gradients(b, "queries_QD", "candidates_CD")
    for one, other in zip(plain, within, strict=True):
        assert torch.equal(one, other)


def test_pairs_are_bounded_when_all_candidates_are_the_same_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_masks, "_PAIRS_AT_ONCE", 20)
    ids = torch.full((C,), 7)
    known = every_key([7, 7, 8], ids)
    left_out = loss_masks.LeftOut(torch.arange(Q), ids, mask_accidental_hits=True, known=known)
    pieces = [torch.stack(pair) for pair in left_out.pairs(1, Q)]
    assert max(piece.shape[1] for piece in pieces) <= 20
    found = torch.cat(pieces, dim=1)
    assert found.shape[1] == 3 * (Q - 1) * C  # once as the positive's item, twice as a known one
    assert set(map(tuple, found.T.tolist())) == {(row, column) for row in range(Q - 1) for column in range(C)}

"""Binary cross-entropy over sampled negatives, with the calibration of gSASRec.

    loss of a query = b softplus(-z of the positive) + sum over negatives of v softplus(z)
    z = score / temperature + offset,    v = (a / q)^s,    b = a (t (1 - 1/a) + 1/a) = 1 - t (1 - a)

a is the sampling rate, the negatives expected of a step over the catalogue's other items; t the calibration;
q how often the candidate is expected among a query's negatives and s the strength of the logQ correction,
which comes in ``log_q_C`` = s log q. softplus(-z) b = -log(sigmoid(z)^b): the positive's probability to the
power b. With negatives drawn uniformly q = a, so v = 1 and this is gSASRec's loss, summed over negatives
instead of their mean; drawn otherwise, v makes the sum an estimate of a times that over the whole catalogue.
With t = 1 and s = 1 the loss then estimates a times the cross-entropy over the whole catalogue, and z becomes
the log odds; t = 0 counts a positive as one negative of the sample, and its probabilities come out too high.

Shapes: as in ``protocol`` and ``blocks``.

Source: Petrov, Macdonald: gSASRec: Reducing overconfidence in sequential recommendation trained with
    negative sampling (RecSys 2023), equations of gBCE and beta. The offset is the bias of Zhai et al.:
    Sigmoid loss for language image pre-training (ICCV 2023), section 3.2, as a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from twotower.config.losses import LossConfig
from twotower.model.loss_masks import Known
from twotower.model.losses.blocks import (
    LOG2_E,
    Block,
    blocked,
    dtype_of,
    fused,
    make_batch,
    own_bias,
    positive_scores,
)
from twotower.model.losses.protocol import GlobalBatch


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """The loss as a ``Loss``."""

    calibration: float
    """t, in [0, 1]."""
    offset: float
    """Added to the logits."""
    log_q_strength: float
    """s, in [0, 1]: what ``log_q_C`` was multiplied by."""

    @classmethod
    def of_settings(cls, settings: LossConfig) -> BinaryCrossEntropy:
        """Return the loss of a configuration."""
        return cls(settings.bce.calibration, settings.bce.offset, settings.log_q)

    def __call__(
        self,
        queries_QD: Tensor,
        candidates_CD: Tensor,
        positive_Q: Tensor,
        temperature: Tensor,
        log_q_C: Tensor,
        candidate_ids_C: Tensor,
        weight_Q: Tensor,
        *,
        mask_accidental_hits: bool,
        known: Known | None,
        own_QHD: Tensor | None,
        own_log_q_QH: Tensor | None,
        whole: Callable[[], GlobalBatch],
    ) -> Tensor:
        """Return the weighted sum of the queries' losses."""
        dtype = dtype_of(queries_QD)
        # One of the candidates is the query's own positive.
        expected = ((candidate_ids_C >= 0).sum() - 1).clamp(min=1).to(dtype)
        rate = expected / max(whole().num_items - 1, 1)
        scale = self.log_q_strength * rate.log()
        count_QH = own_bias(own_QHD, own_log_q_QH)
        offset_QH = None
        if count_QH is not None:
            offset_QH = count_QH.new_full(count_QH.shape, self.offset)
            count_QH = (count_QH + scale).exp()
        batch = make_batch(
            queries_QD,
            positive_Q,
            log_q_C.new_full(log_q_C.shape, self.offset, dtype=dtype),
            candidate_ids_C,
            weight_Q,
            mask_accidental_hits,
            known,
            offset_QH,
        )
        own_QHD = None if count_QH is None else own_QHD
        # Padding has no logit, so it needs a finite number here alone.
        counts = (scale - log_q_C.detach().to(dtype)).masked_fill(candidate_ids_C < 0, 0).exp()
        compute = partial(blocked, _Negatives(counts, count_QH))
        negatives = fused(compute, queries_QD, candidates_CD, temperature, own_QHD, batch)
        z_Q = positive_scores(queries_QD, candidates_CD, positive_Q) / temperature.to(dtype) + self.offset
        positives = (batch.weight_Q * _softplus(-z_Q)).sum()
        return (1 - self.calibration * (1 - rate)) * positives + negatives


@dataclass(frozen=True)
class _Negatives:
    """Sum of a block's negatives, each as often as it counts."""

    count_C: Tensor
    """[C]"""
    count_QH: Tensor | None
    """[Q, H]"""
    with_positive = False

    def __call__(self, block: Block) -> tuple[Tensor, Tensor]:
        z_RC, own_RH, weight_R = block.logits_RC.mul_(1 / LOG2_E), block.own_RH, block.weight_R
        loss_R = _softplus(z_RC) @ self.count_C
        z_RC.sigmoid_().mul_(self.count_C)
        if own_RH is not None and self.count_QH is not None:
            count_RH = self.count_QH[block.first : block.last]
            own_RH.mul_(1 / LOG2_E)
            loss_R += (_softplus(own_RH) * count_RH).sum(1)
            own_RH.sigmoid_().mul_(count_RH)
        return (loss_R * weight_R).sum(), weight_R


def _softplus(x: Tensor) -> Tensor:
    # exp(40) is a float32; above it the logarithm of 1 + exp(x) is x to the last bit.
    return F.softplus(x, threshold=40.0)

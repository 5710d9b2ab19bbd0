"""Bilateral softmax loss: a log-expectation-exp over the positives too, and a power on the negatives.

    loss of a query = - r log E_P[exp(score / (r t))] + p log sum_N exp(score / t - log_q)

t is the temperature, r t that of the positive side, p the power of the negative side; P are the examples of
the same user in the global batch, each scored by its own query and weighted by its weight, N the candidates
without the positive and what is left out. With p = 1 it is the paper's loss (over its second temperature);
with r = 1 that of the authors' code, which made the published figures with p from 1.06 to 1.32.

Among a user's positives those with high scores get the gradient, so noisy ones count less; p above 1 pushes
queries and negatives apart beyond what ranks the positive first. Unlike the softmax it has no least value
where scores can grow or the temperature can fall: it wants unit vectors and a fixed temperature.

Shapes: as in ``protocol`` and ``blocks``; G users of the global batch.

Source: Wu et al.: BSL: Understanding and improving softmax loss for recommendation (ICDE 2024), equation of
    BSL; junkangwu/BSL, utils/losses.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
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
class BilateralSoftmax:
    """The loss as a ``Loss``."""

    positive_temperature: float
    """r, over the temperature."""
    negative_power: float
    """p."""

    @classmethod
    def of_settings(cls, settings: LossConfig) -> BilateralSoftmax:
        """Return the loss of a configuration."""
        return cls(settings.bsl.positive_temperature, settings.bsl.negative_power)

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
        """Return the weighted sum of the queries' losses.

        Collective: all ranks.
        """
        bias_QH = own_bias(own_QHD, own_log_q_QH)
        batch = make_batch(
            queries_QD, positive_Q, -log_q_C, candidate_ids_C, weight_Q, mask_accidental_hits, known, bias_QH
        )
        own_QHD = None if bias_QH is None else own_QHD
        compute = partial(blocked, _LogSumExp())
        negatives = fused(compute, queries_QD, candidates_CD, temperature, own_QHD, batch)
        scores_Q = positive_scores(queries_QD, candidates_CD, positive_Q)
        scaled_Q = scores_Q / (temperature.to(scores_Q.dtype) * self.positive_temperature)
        positives = log_mean_exp(scaled_Q, weight_Q, whole())
        return self.negative_power * negatives - self.positive_temperature * positives


class _LogSumExp:
    """Log-sum-exp of a block's negatives; 0 for a query that has none."""

    with_positive = False

    def __call__(self, block: Block) -> tuple[Tensor, Tensor]:
        weight_R = block.weight_R
        total_R, peak_R1 = block.powers()
        nothing_R = (weight_R == 0) | (total_R == 0)
        bits_R = total_R.log2() + peak_R1[:, 0]
        loss = (bits_R * weight_R).masked_fill_(nothing_R, 0).sum() / LOG2_E
        return loss, (weight_R / total_R).masked_fill_(nothing_R, 0)


def log_mean_exp(x_Q: Tensor, weight_Q: Tensor, whole: GlobalBatch) -> Tensor:
    """Return the sum over queries of weight x log E[exp(x)] over the examples of the query's user.

    The expectation is that of examples drawn by their weight. A user's examples may be on several ranks: what
    is gathered has no gradient, and each rank forms the gradient of its own x from the sums of all.

    Args:
        x_Q: [Q] with gradient.
        weight_Q: [Q], 0 for padding.
        whole: the global batch, of which these queries are a part.

    Collective: all ranks.
    """
    dtype = dtype_of(x_Q)
    weight_Q, weight_B = weight_Q.detach().to(dtype), whole.weight_B.to(dtype)
    there_B = weight_B > 0
    all_B = whole.gather(x_Q.detach()).masked_fill(~there_B, -torch.inf)
    users_G, group_B = whole.users_B.unique(return_inverse=True)
    nothing_G = all_B.new_full(users_G.shape, torch.finfo(dtype).min)
    peak_G = nothing_G.scatter_reduce(0, group_B, all_B, "amax")
    share_B = weight_B * (all_B - peak_G[group_B]).exp()
    zeros_G = torch.zeros_like(peak_G)
    sum_G, weight_G = (zeros_G.index_add(0, group_B, part_B) for part_B in (share_B, weight_B))
    mine = slice(whole.first, whole.first + len(x_Q))
    group_Q = group_B[mine]
    value_G = peak_G + (sum_G / weight_G).log()
    value = (weight_Q * value_G[group_Q]).masked_fill(weight_Q == 0, 0).sum()
    slope_Q = (share_B[mine] * (weight_G / sum_G)[group_Q]).masked_fill(weight_Q == 0, 0)
    # Adds nothing to the value, and the slopes to the gradient.
    return value + (slope_Q * (x_Q - x_Q.detach())).sum()

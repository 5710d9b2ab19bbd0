"""Softmax that looks at the top k: an example counts more, the nearer its positive is to the k best.

    loss of a query = sigmoid((score of the positive - b) / w) x in-batch softmax

b is the k-th highest score among the query's candidates (its positive and its negatives), w the width of the
sigmoid in scores. The weight is a constant of the step, so an example far below the top k gets a small
gradient instead of one that lowers its score. k counts candidates: of C that stand for N items, rank k is
about rank k N / C of the catalogue.

Shapes: as in ``protocol`` and ``blocks``.

Source: Yang et al.: Breaking the top-K barrier: Advancing top-K ranking metrics optimization in recommender
    systems (KDD 2025), SL@K with its quantile estimated by sorting the sampled items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.config.losses import LossConfig
from twotower.model.loss_masks import Known
from twotower.model.losses.blocks import LOG2_E, Matrix, make_batch, own_bias
from twotower.model.losses.protocol import GlobalBatch
from twotower.model.losses.softmax import in_batch_softmax


@dataclass(frozen=True)
class TopKSoftmax:
    """The loss as a ``Loss``."""

    k: int
    width: float
    """w, in scores."""

    @classmethod
    def of_settings(cls, settings: LossConfig) -> TopKSoftmax:
        """Return the loss of a configuration."""
        return cls(settings.slatk.k, settings.slatk.width)

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
        bias_QH = own_bias(own_QHD, own_log_q_QH)
        if bias_QH is not None:
            bias_QH = torch.zeros_like(bias_QH).masked_fill_(bias_QH == -torch.inf, -torch.inf)
        batch = make_batch(
            queries_QD,
            positive_Q,
            torch.zeros_like(log_q_C),
            candidate_ids_C,
            weight_Q,
            mask_accidental_hits,
            known,
            bias_QH,
        )
        own = None if bias_QH is None else own_QHD
        with torch.autocast(queries_QD.device.type, enabled=False):
            margin_Q = self._margins(
                Matrix(queries_QD, candidates_CD, torch.ones_like(temperature), own, batch)
            )
        return in_batch_softmax(
            queries_QD,
            candidates_CD,
            positive_Q,
            temperature,
            log_q_C,
            candidate_ids_C,
            batch.weight_Q * torch.sigmoid(margin_Q / self.width),
            mask_accidental_hits=mask_accidental_hits,
            known=known,
            own_QHD=own_QHD,
            own_log_q_QH=own_log_q_QH,
        )

    def _margins(self, scores: Matrix) -> Tensor:
        """Return how far each positive's score is above the k-th highest, [Q]; +inf where there are fewer."""
        margins = []
        for first, last in scores.spans():
            block = scores.block(first, last)
            best_RK = block.logits_RC.topk(min(self.k, block.logits_RC.shape[1])).values
            if block.own_RH is not None:
                best_RK = torch.cat([best_RK, block.own_RH], dim=1)
            if best_RK.shape[1] < self.k:
                margins.append(torch.full_like(block.weight_R, torch.inf))
                continue
            margins.append((block.right_R1 - best_RK.topk(self.k).values[:, -1:])[:, 0] / LOG2_E)
            del block
        # The k-th highest is -inf where fewer are left, and a padding query's positive may be -inf too.
        return torch.cat(margins).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)

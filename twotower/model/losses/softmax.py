"""In-batch softmax with logQ correction, over blocks of queries: no matrix of queries x candidates.

Shapes: as in ``protocol`` and ``blocks``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from twotower.config.losses import LossConfig
from twotower.model.loss_masks import Known
from twotower.model.losses.blocks import (
    LOG2_E,
    Block,
    Compute,
    blocked,
    dtype_of,
    fused,
    make_batch,
    own_bias,
)
from twotower.model.losses.protocol import GlobalBatch, Loss


def of_settings(settings: LossConfig) -> Loss:
    """Return the loss of a configuration; the softmax has no settings of its own."""
    return in_batch_softmax


def in_batch_softmax(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    positive_Q: Tensor,
    temperature: Tensor,
    log_q_C: Tensor,
    candidate_ids_C: Tensor,
    weight_Q: Tensor,
    *,
    mask_accidental_hits: bool,
    known: Known | None = None,
    own_QHD: Tensor | None = None,
    own_log_q_QH: Tensor | None = None,
    whole: Callable[[], GlobalBatch] | None = None,
) -> Tensor:
    """Return the weighted sum of the cross entropies of each query's positive among the candidates.

    logits = scores / temperature - log_q. The result is a scalar in float32, or in float64 for float64
    queries; bfloat16 inputs are computed in float32. For the item-to-query direction the two sides swap:
    candidates are then the queries of the global batch and ``candidate_ids_C`` their positive items.

    Args:
        queries_QD: [Q, D].
        candidates_CD: [C, D], finite also at padding.
        positive_Q: [Q] int64, column of each query's positive; any column for padding queries.
        temperature: scalar > 0.
        log_q_C: [C] float32, log of the probability that the candidate enters a batch.
        candidate_ids_C: [C] int64, equal for equal items; -1 is padding and takes part in nothing.
        weight_Q: [Q] float32; 0 for padding queries, which have no loss and no gradient.
        mask_accidental_hits: leave out other candidates with the positive's id.
        known: further candidates to leave out; the positive itself always stays.
        own_QHD: [Q, H, D], negatives of that query alone.
        own_log_q_QH: [Q, H] float32, their log_q; +inf where there is none. Zero when not given.
        whole: not needed; every ``Loss`` takes it.

    Gradient: flows to queries, candidates, temperature and own negatives, once (no second derivatives).

    Source: Yi et al.: Sampling-bias-corrected neural modeling for large corpus item recommendations
        (RecSys 2019), section 3 (logQ correction).
    """
    bias_QH = own_bias(own_QHD, own_log_q_QH)
    batch = make_batch(
        queries_QD, positive_Q, -log_q_C, candidate_ids_C, weight_Q, mask_accidental_hits, known, bias_QH
    )
    compute = _implementation(queries_QD, dtype_of(queries_QD))
    own_QHD = None if bias_QH is None else own_QHD
    return fused(compute, queries_QD, candidates_CD, temperature, own_QHD, batch)


def _implementation(queries_QD: Tensor, dtype: torch.dtype) -> Compute:
    """Return the Triton kernels for NVIDIA GPUs where Triton is installed, else the blocks of rows."""
    on_nvidia = queries_QD.is_cuda and torch.version.cuda is not None
    if on_nvidia and dtype == torch.float32 and importlib.util.find_spec("triton"):
        from twotower.model.loss_kernels import loss_by_kernels

        return loss_by_kernels
    return partial(blocked, _CrossEntropy())


class _CrossEntropy:
    """Cross entropy of a block's positives."""

    with_positive = True

    def __call__(self, block: Block) -> tuple[Tensor, Tensor]:
        block_RC, weight_R = block.logits_RC, block.weight_R
        total_R, peak_R1 = block.powers()
        bits_R = total_R.log2() + (peak_R1 - block.right_R1)[:, 0]
        loss = (bits_R * weight_R).masked_fill_(weight_R == 0, 0).sum() / LOG2_E
        block_RC.scatter_add_(1, block.positive_R1, -total_R[:, None])
        return loss, (weight_R / total_R).masked_fill_(weight_R == 0, 0)

"""In-batch softmax with logQ correction, over blocks of queries: no matrix of queries x candidates.

The loss is a scalar, so its gradients are formed in the forward pass, block by block, while the block's
softmax is at hand; the backward pass only scales them. That takes the three matrix products that any
implementation needs, keeps no logits and computes nothing twice.

Shapes: Q local queries, C candidates of the global batch, D embedding_dim, H own negatives of a query,
R queries of a block.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.loss_masks import Batch, Known, LeftOut

__all__ = ["Known", "in_batch_softmax"]

_BLOCK_BYTES = 8 << 20
"""Logits that are held at a time; larger blocks leave the cache, smaller ones make slow matrix products."""
_FEWEST_ROWS = 256
"""Queries of a block at least. With many candidates its logits leave the cache (at D = 128 they take as much
memory as the candidates and their gradient), and it is still right not to cut it into tiles of candidates,
which would take a fourth matrix product. Measured per floating-point operation at 262,144 candidates:
256 rows take 1.7 times the time at 8,192 candidates, much of it for what is done once however many queries
there are; 64 rows 3 times, 16 rows 8 times."""
_LOG2_E = math.log2(math.e)


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

    Gradient: flows to queries, candidates, temperature and own negatives, once (no second derivatives).

    Source: Yi et al.: Sampling-bias-corrected neural modeling for large corpus item recommendations
        (RecSys 2019), section 3 (logQ correction).
    """
    dtype = torch.promote_types(queries_QD.dtype, torch.float32)
    own_bias_QH = None
    if own_QHD is not None and own_QHD.shape[1] == 0:
        own_QHD = None
    if own_QHD is not None:
        own_bias_QH = own_QHD.new_zeros(own_QHD.shape[:2], dtype=dtype)
        if own_log_q_QH is not None:
            own_bias_QH -= own_log_q_QH.detach()
    batch = Batch(
        positive_Q,
        -log_q_C.detach().to(dtype).masked_fill(candidate_ids_C < 0, math.inf),
        weight_Q.detach().to(dtype),
        LeftOut(positive_Q, candidate_ids_C, mask_accidental_hits, known),
        own_bias_QH,
    )
    inputs = (queries_QD, candidates_CD, temperature, own_QHD)
    with torch.autocast(queries_QD.device.type, enabled=False):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            loss: Tensor = _InBatchSoftmax.apply(*inputs, batch)
        else:
            loss = _implementation(queries_QD, dtype)(*inputs, batch, with_gradients=False)[0]
    return loss


class _InBatchSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_QD: Tensor,
        candidates_CD: Tensor,
        temperature: Tensor,
        own: Tensor | None,
        batch: Batch,
    ) -> Tensor:
        compute = _implementation(queries_QD, batch.weight_Q.dtype)
        loss, gradients = compute(queries_QD, candidates_CD, temperature, own, batch, with_gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors), None


def _implementation(queries_QD: Tensor, dtype: torch.dtype) -> Callable[..., Any]:
    """Return the Triton kernels for NVIDIA GPUs where Triton is installed, else the blocks of rows."""
    on_nvidia = queries_QD.is_cuda and torch.version.cuda is not None
    if on_nvidia and dtype == torch.float32 and importlib.util.find_spec("triton"):
        from twotower.model.loss_kernels import loss_by_kernels

        return loss_by_kernels
    return _blocked


def _blocked(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    temperature: Tensor,
    own_QHD: Tensor | None,
    batch: Batch,
    *,
    with_gradients: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the loss, and its gradients to the first four arguments where they are asked for."""
    dtype = batch.weight_Q.dtype
    q_QD, c_CD, t = (
        queries_QD.detach().to(dtype),
        candidates_CD.detach().to(dtype),
        temperature.detach().to(dtype),
    )
    own = None if own_QHD is None else own_QHD.detach().to(dtype)
    loss = q_QD.new_zeros(())
    d_q = torch.empty_like(q_QD) if with_gradients else None
    # Laid out as the products give and take it: a sum over two layouts takes half of a product's time.
    c_DC = c_CD.T.contiguous()
    d_c_DC = torch.zeros_like(c_DC) if with_gradients else None
    d_own = torch.empty_like(own) if with_gradients and own is not None else None
    linear = _fastest_linear(q_QD)
    bias_C = batch.bias_C * _LOG2_E
    rows = max(_FEWEST_ROWS, _BLOCK_BYTES // (len(c_CD) * c_CD.element_size()))
    for first in range(0, len(q_QD), rows):
        last = min(first + rows, len(q_QD))
        q_RD = q_QD[first:last]
        # Logits in base 2 throughout: exp2 takes a third of exp's time.
        scaled_RD = q_RD * (_LOG2_E / t)
        weight_R = batch.weight_Q[first:last]
        positive_R1 = batch.positive_Q[first:last, None]
        block_RC = linear(scaled_RD, c_CD, bias_C)
        right_R1 = block_RC.gather(1, positive_R1)
        for row, column in batch.left_out.pairs(first, last):
            block_RC.view(-1).index_fill_(0, row * len(c_CD) + column, -math.inf)
        block_RC.scatter_(1, positive_R1, right_R1)
        # A row in which everything is left out has weight 0; without the floor it would be NaN.
        peak_R1 = block_RC.amax(1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        if own is not None and batch.own_bias_QH is not None:
            own_RH = torch.einsum("rd,rhd->rh", scaled_RD, own[first:last])
            own_RH += batch.own_bias_QH[first:last] * _LOG2_E
            peak_R1 = torch.maximum(peak_R1, own_RH.amax(1, keepdim=True))
            own_RH.sub_(peak_R1).exp2_()
        block_RC.sub_(peak_R1).exp2_()
        total_R = block_RC.sum(1)
        if own is not None:
            total_R += own_RH.sum(1)
        bits_R = total_R.log2() + (peak_R1 - right_R1)[:, 0]
        loss += (bits_R * weight_R).masked_fill_(weight_R == 0, 0).sum() / _LOG2_E
        if d_q is None or d_c_DC is None:
            continue
        block_RC.scatter_add_(1, positive_R1, -total_R[:, None])
        scale_R1 = (weight_R / total_R).masked_fill_(weight_R == 0, 0)[:, None] / t
        d_RD = linear(block_RC, c_DC)
        if own is not None and d_own is not None:
            d_RD += torch.einsum("rh,rhd->rd", own_RH, own[first:last])
            d_own[first:last] = (own_RH * scale_R1)[:, :, None] * q_RD[:, None, :]
        torch.mul(d_RD, scale_R1, out=d_q[first:last])
        d_c_DC += linear((q_RD * scale_R1).T, block_RC.T)
        del block_RC  # the next block takes its place, which is still in the cache
    if d_q is None or d_c_DC is None:
        return loss, ()
    # dloss/dt = sum over logits of dloss/dlogit x (-score / t^2) = -(queries . d_queries) / t.
    d_t = -torch.dot(q_QD.flatten(), d_q.flatten()) / t
    return loss, (
        d_q.to(queries_QD.dtype),
        d_c_DC.T.to(candidates_CD.dtype).contiguous(),
        d_t.to(temperature.dtype),
        None if d_own is None or own_QHD is None else d_own.to(own_QHD.dtype),
    )


def _fastest_linear(x: Tensor) -> Callable[..., Tensor]:
    """Return F.linear, or oneDNN's version of it where that is faster for tensors like ``x``.

    On CPUs torch leaves float32 products to MKL, which is made for Intel's processors; oneDNN, which torch
    ships too, is faster on others. Measured for the three products of a block of 256 x 8192, all blocks: on
    two Zen 5 cores 46, 43 and 45 ms against 110, 102 and 110; on one Zen 4 core 189, 169 and 192 against 223,
    197 and 227, kept to AVX2 202, 188 and 202 against 220, 197 and 216. Not measured on Intel's.
    """
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    wide = x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if onednn is None or not wide or x.dtype != torch.float32:
        return F.linear
    return lambda x, weight, bias=None: onednn(x, weight, bias, "none", [], "")

"""Logits of queries x candidates in blocks of queries, and losses whose gradients are formed with them.

A loss is a scalar, so its gradients are formed in the forward pass, block by block, while the block's
logits are at hand; the backward pass only scales them. That takes the three matrix products that any
implementation needs, keeps no logits and computes nothing twice.

Shapes: Q local queries, C candidates of the global batch, D embedding_dim, H own negatives of a query,
R queries of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.model.loss_masks import Batch, Known, LeftOut

_BLOCK_BYTES = 8 << 20
"""Logits that are held at a time; larger blocks leave the cache, smaller ones make slow matrix products."""
_FEWEST_ROWS = 256
"""Queries of a block at least. With many candidates its logits leave the cache (at D = 128 they take as much
memory as the candidates and their gradient), and it is still right not to cut it into tiles of candidates,
which would take a fourth matrix product. Measured per floating-point operation at 262,144 candidates:
256 rows take 1.7 times the time at 8,192 candidates, much of it for what is done once however many queries
there are; 64 rows 3 times, 16 rows 8 times."""
LOG2_E = math.log2(math.e)

Compute = Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]
"""Takes queries, candidates, temperature, own negatives, a ``Batch`` and ``with_gradients``; returns the
loss, and its gradients to the first four where they are asked for."""


@dataclass
class Block:
    """The logits of some queries, in base 2: exp2 takes a third of exp's time."""

    first: int
    """The first of these queries."""
    last: int
    """The one behind the last."""
    logits_RC: Tensor
    """[R, C], -inf where left out and at padding."""
    own_RH: Tensor | None
    """[R, H], logits of own negatives."""
    positive_R1: Tensor
    """[R, 1] int64, the positive's column."""
    right_R1: Tensor
    """[R, 1], the positive's logit."""
    weight_R: Tensor
    """[R], 0 for padding queries."""

    def powers(self) -> tuple[Tensor, Tensor]:
        """Make all logits powers of 2 over their row's highest one, in place.

        Returns:
            sums of the rows' powers [R], and the highest logits [R, 1].
        """
        # A row in which everything is left out has weight 0; without the floor it would be NaN.
        peak_R1 = self.logits_RC.amax(1, keepdim=True).clamp_(min=torch.finfo(self.logits_RC.dtype).min)
        if self.own_RH is not None:
            peak_R1 = torch.maximum(peak_R1, self.own_RH.amax(1, keepdim=True))
            self.own_RH.sub_(peak_R1).exp2_()
        self.logits_RC.sub_(peak_R1).exp2_()
        total_R = self.logits_RC.sum(1)
        if self.own_RH is not None:
            total_R += self.own_RH.sum(1)
        return total_R, peak_R1


class Rows(Protocol):
    """What a loss makes of a block."""

    @property
    def with_positive(self) -> bool:
        """Whether the positive is among the candidates; otherwise its column is -inf too."""

    def __call__(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return the block's loss, weighted, and a factor for each of its rows, [R].

        ``logits_RC`` and ``own_RH`` are changed in place to the derivatives of the loss by score /
        temperature, over the row's factor.
        """


class Matrix:
    """Logits = scores / temperature + bias, of which a block exists at a time."""

    def __init__(
        self,
        queries_QD: Tensor,
        candidates_CD: Tensor,
        temperature: Tensor,
        own_QHD: Tensor | None,
        batch: Batch,
        *,
        with_positive: bool = True,
    ) -> None:
        """Convert the inputs to the type of the batch; nothing here has a gradient."""
        dtype = batch.weight_Q.dtype
        self.q_QD = queries_QD.detach().to(dtype)
        self.c_CD = candidates_CD.detach().to(dtype)
        self.t = temperature.detach().to(dtype)
        self.own_QHD = None if own_QHD is None else own_QHD.detach().to(dtype)
        self.linear = fastest_linear(self.q_QD)
        self._bias_C = batch.bias_C * LOG2_E
        self._batch = batch
        self._with_positive = with_positive

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the first query and the one behind the last of each block."""
        rows = max(_FEWEST_ROWS, _BLOCK_BYTES // (len(self.c_CD) * self.c_CD.element_size()))
        for first in range(0, len(self.q_QD), rows):
            yield first, min(first + rows, len(self.q_QD))

    def block(self, first: int, last: int) -> Block:
        """Return the logits of queries [first, last)."""
        batch = self._batch
        scaled_RD = self.q_QD[first:last] * (LOG2_E / self.t)
        positive_R1 = batch.positive_Q[first:last, None]
        block_RC = self.linear(scaled_RD, self.c_CD, self._bias_C)
        right_R1 = block_RC.gather(1, positive_R1)
        for row, column in batch.left_out.pairs(first, last):
            block_RC.view(-1).index_fill_(0, row * len(self.c_CD) + column, -math.inf)
        if self._with_positive:
            block_RC.scatter_(1, positive_R1, right_R1)
        else:
            block_RC.scatter_(1, positive_R1, -math.inf)
        own_RH = None
        if self.own_QHD is not None and batch.own_bias_QH is not None:
            own_RH = torch.einsum("rd,rhd->rh", scaled_RD, self.own_QHD[first:last])
            own_RH += batch.own_bias_QH[first:last] * LOG2_E
        return Block(first, last, block_RC, own_RH, positive_R1, right_R1, batch.weight_Q[first:last])


def blocked(
    rows: Rows,
    queries_QD: Tensor,
    candidates_CD: Tensor,
    temperature: Tensor,
    own_QHD: Tensor | None,
    batch: Batch,
    *,
    with_gradients: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the loss, and its gradients to queries, candidates, temperature and own negatives if asked."""
    matrix = Matrix(queries_QD, candidates_CD, temperature, own_QHD, batch, with_positive=rows.with_positive)
    q_QD, t, own, linear = matrix.q_QD, matrix.t, matrix.own_QHD, matrix.linear
    loss = q_QD.new_zeros(())
    d_q = torch.empty_like(q_QD) if with_gradients else None
    # Laid out as the products give and take it: a sum over two layouts takes half of a product's time.
    c_DC = matrix.c_CD.T.contiguous()
    d_c_DC = torch.zeros_like(c_DC) if with_gradients else None
    d_own = torch.empty_like(own) if with_gradients and own is not None else None
    for first, last in matrix.spans():
        block = matrix.block(first, last)
        part, factor_R = rows(block)
        loss += part
        if d_q is None or d_c_DC is None:
            continue
        q_RD = q_QD[first:last]
        scale_R1 = factor_R[:, None] / t
        d_RD = linear(block.logits_RC, c_DC)
        if own is not None and d_own is not None and block.own_RH is not None:
            d_RD += torch.einsum("rh,rhd->rd", block.own_RH, own[first:last])
            d_own[first:last] = (block.own_RH * scale_R1)[:, :, None] * q_RD[:, None, :]
        torch.mul(d_RD, scale_R1, out=d_q[first:last])
        d_c_DC += linear((q_RD * scale_R1).T, block.logits_RC.T)
        del block  # the next block takes its place, which is still in the cache
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


def fused(
    compute: Compute,
    queries_QD: Tensor,
    candidates_CD: Tensor,
    temperature: Tensor,
    own_QHD: Tensor | None,
    batch: Batch,
) -> Tensor:
    """Return a loss with the gradients that it forms itself, once (no second derivatives)."""
    inputs = (queries_QD, candidates_CD, temperature, own_QHD)
    with torch.autocast(queries_QD.device.type, enabled=False):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            loss: Tensor = _Fused.apply(*inputs, batch, compute)
        else:
            loss = compute(*inputs, batch, with_gradients=False)[0]
    return loss


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries_QD: Tensor,
        candidates_CD: Tensor,
        temperature: Tensor,
        own: Tensor | None,
        batch: Batch,
        compute: Compute,
    ) -> Tensor:
        loss, gradients = compute(queries_QD, candidates_CD, temperature, own, batch, with_gradients=True)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors), None, None


def make_batch(
    queries_QD: Tensor,
    positive_Q: Tensor,
    bias_C: Tensor,
    candidate_ids_C: Tensor,
    weight_Q: Tensor,
    mask_accidental_hits: bool,
    known: Known | None,
    own_bias_QH: Tensor | None,
) -> Batch:
    """Return the inputs without gradient, in float32, or in float64 for float64 queries.

    Args:
        queries_QD: [Q, D], for the type.
        positive_Q: [Q] int64.
        bias_C: [C], added to the logits; padding gets -inf.
        candidate_ids_C: [C] int64, -1 padding.
        weight_Q: [Q].
        mask_accidental_hits: leave out other candidates with the positive's id.
        known: further candidates to leave out.
        own_bias_QH: [Q, H], added to the logits of own negatives; -inf where there is none.
    """
    dtype = dtype_of(queries_QD)
    return Batch(
        positive_Q,
        bias_C.detach().to(dtype).masked_fill(candidate_ids_C < 0, -math.inf),
        weight_Q.detach().to(dtype),
        LeftOut(positive_Q, candidate_ids_C, mask_accidental_hits, known),
        own_bias_QH,
    )


def own_bias(own_QHD: Tensor | None, own_log_q_QH: Tensor | None) -> Tensor | None:
    """Return -log_q of own negatives, [Q, H] in the type of the loss; None where there is none at all."""
    if own_QHD is None or own_QHD.shape[1] == 0:
        return None
    bias_QH = own_QHD.new_zeros(own_QHD.shape[:2], dtype=dtype_of(own_QHD))
    if own_log_q_QH is not None:
        bias_QH -= own_log_q_QH.detach()
    return bias_QH


def positive_scores(queries_QD: Tensor, candidates_CD: Tensor, positive_Q: Tensor) -> Tensor:
    """Return the score of each query's positive, [Q] with gradient, in the type of the loss."""
    dtype = dtype_of(queries_QD)
    with torch.autocast(queries_QD.device.type, enabled=False):
        return (queries_QD.to(dtype) * candidates_CD.index_select(0, positive_Q).to(dtype)).sum(1)


def dtype_of(x: Tensor) -> torch.dtype:
    """Return the type that a loss of such vectors is computed in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def fastest_linear(x: Tensor) -> Callable[..., Tensor]:
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

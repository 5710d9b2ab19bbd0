"""The in-batch softmax by Triton kernels, for NVIDIA GPUs: logits live in registers, tile by tile.

Two kernels: one goes over the candidates for a tile of queries with a running log-sum-exp and, along with it,
the mean candidate under the softmax, which is all that the queries' gradient needs; one goes over the queries
for a tile of candidates and forms the candidates' gradient from logits that it computes again. What is left
out comes as packed bits of one super-block of queries at a time.

Shapes: Q queries, C candidates, D embedding_dim, H own negatives; R queries of a super-block, W words of 32
candidates, P pairs. In a kernel M queries and N candidates of a tile.

Source: Dao: FlashAttention-2 (2023), algorithm 1, with candidates as keys and values.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.model.loss_masks import Batch, LeftOut

_BITS_BYTES = 256 << 20
"""Memory of a super-block's bits: 8,192 queries at 262,144 candidates, which keeps a large GPU busy."""
_LOG2_E = math.log2(math.e)


@triton.jit
def _set_bits(
    words_ptr, rows_ptr, columns_ptr, num_pairs, num_words, CLEAR: tl.constexpr, BLOCK: tl.constexpr
):
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < num_pairs
    row = tl.load(rows_ptr + p, mask=inside, other=0)
    column = tl.load(columns_ptr + p, mask=inside, other=0)
    bit = (tl.full((BLOCK,), 1, tl.int32) << (column % 32).to(tl.int32)).to(tl.int32)
    # Atomic, because a pair can come more than once and neighbours share a word.
    if CLEAR:
        tl.atomic_and(words_ptr + row * num_words + column // 32, ~bit, mask=inside)
    else:
        tl.atomic_or(words_ptr + row * num_words + column // 32, bit, mask=inside)


@triton.jit
def _logits(
    q_MD,
    c_ND,
    scale,
    bias_ptr,
    words_ptr,
    rows_M,
    begin,
    num_rows,
    num_words,
    C,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the logits of a tile in base 2, -inf where left out, at padding and outside the matrix."""
    columns_N = begin + tl.arange(0, TILE)
    bias_N = tl.load(bias_ptr + columns_N, mask=columns_N < C, other=float("-inf"))
    word = begin // 32 + tl.arange(0, TILE // 32)
    inside = (rows_M < num_rows)[:, None] & (word < num_words)[None, :]
    words = tl.load(
        words_ptr + rows_M.to(tl.int64)[:, None] * num_words + word[None, :], mask=inside, other=-1
    )
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    scores = tl.dot(q_MD, tl.trans(c_ND), input_precision=PRECISION)
    return tl.where(tl.reshape(bits, (TILE, TILE)) == 1, float("-inf"), scores * scale + bias_N[None, :])


@triton.jit
def _rows(ptr, rows_M, num_rows, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Return rows of a contiguous matrix, 0 outside of it."""
    d = tl.arange(0, D_PADDED)
    inside = (rows_M < num_rows)[:, None] & (d < D)[None, :]
    return tl.load(ptr + rows_M.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def _over_candidates(
    q_ptr,
    c_ptr,
    scale_ptr,
    bias_ptr,
    words_ptr,
    lse_ptr,
    mean_ptr,
    num_rows,
    num_words,
    C,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write each query's log-sum-exp (base 2) and the mean candidate under its softmax."""
    rows_M = tl.program_id(0) * TILE + tl.arange(0, TILE)
    q_MD = _rows(q_ptr, rows_M, num_rows, D, D_PADDED)
    scale = tl.load(scale_ptr)
    # Finite, so that a row in which everything is left out gives exp2(-inf) and no NaN.
    peak_M = tl.full((TILE,), -1e30, tl.float32)
    total_M = tl.zeros((TILE,), tl.float32)
    sum_MD = tl.zeros((TILE, D_PADDED), tl.float32)
    for begin in range(0, C, TILE):
        c_ND = _rows(c_ptr, begin + tl.arange(0, TILE), C, D, D_PADDED)
        logits_MN = _logits(
            q_MD, c_ND, scale, bias_ptr, words_ptr, rows_M, begin, num_rows, num_words, C, TILE, PRECISION
        )
        higher_M = tl.maximum(peak_M, tl.max(logits_MN, 1))
        p_MN = tl.exp2(logits_MN - higher_M[:, None])
        shrink_M = tl.exp2(peak_M - higher_M)
        total_M = total_M * shrink_M + tl.sum(p_MN, 1)
        if WITH_MEAN:
            sum_MD = sum_MD * shrink_M[:, None] + tl.dot(p_MN.to(c_ND.dtype), c_ND, input_precision=PRECISION)
        peak_M = higher_M
    tl.store(lse_ptr + rows_M, peak_M + tl.log2(total_M), mask=rows_M < num_rows)
    if WITH_MEAN:
        d = tl.arange(0, D_PADDED)
        inside = (rows_M < num_rows)[:, None] & (d < D)[None, :]
        mean_MD = sum_MD / tl.where(total_M == 0, 1, total_M)[:, None]
        tl.store(mean_ptr + rows_M[:, None] * D + d[None, :], mean_MD, mask=inside)


@triton.jit
def _over_queries(
    q_ptr,
    c_ptr,
    scale_ptr,
    bias_ptr,
    words_ptr,
    lse_ptr,
    positive_ptr,
    weight_ptr,
    d_c_ptr,
    num_rows,
    num_words,
    C,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add weight x (softmax - one at the positive) x query, over queries, to the candidates' gradient."""
    begin = tl.program_id(0) * TILE
    columns_N = begin + tl.arange(0, TILE)
    c_ND = _rows(c_ptr, columns_N, C, D, D_PADDED)
    scale = tl.load(scale_ptr)
    sum_ND = tl.zeros((TILE, D_PADDED), tl.float32)
    for first in range(0, num_rows, TILE):
        rows_M = first + tl.arange(0, TILE)
        q_MD = _rows(q_ptr, rows_M, num_rows, D, D_PADDED)
        logits_MN = _logits(
            q_MD, c_ND, scale, bias_ptr, words_ptr, rows_M, begin, num_rows, num_words, C, TILE, PRECISION
        )
        inside = rows_M < num_rows
        lse_M = tl.load(lse_ptr + rows_M, mask=inside, other=float("inf"))
        weight_M = tl.load(weight_ptr + rows_M, mask=inside, other=0.0)
        positive_M = tl.load(positive_ptr + rows_M, mask=inside, other=-1)
        p_MN = tl.exp2(logits_MN - lse_M[:, None]) - (positive_M[:, None] == columns_N[None, :]).to(
            tl.float32
        )
        p_MN = (p_MN * weight_M[:, None]).to(q_MD.dtype)
        sum_ND += tl.dot(tl.trans(p_MN), q_MD, input_precision=PRECISION)
    d = tl.arange(0, D_PADDED)
    inside = (columns_N < C)[:, None] & (d < D)[None, :]
    place = d_c_ptr + columns_N.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + sum_ND, mask=inside)


def loss_by_kernels(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    temperature: Tensor,
    own_QHD: Tensor | None,
    batch: Batch,
    *,
    with_gradients: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the loss, and its gradients to the first four arguments where they are asked for.

    Tiles are multiplied in the type of the inputs (bfloat16, or float32 in three TF32 passes, about as exact
    as float32) and summed in float32.
    """
    q_QD = queries_QD.detach().contiguous()
    c_CD = candidates_CD.detach().to(q_QD.dtype).contiguous()
    t = temperature.detach().float()
    own = None if own_QHD is None else own_QHD.detach().float()
    num_candidates, dim = c_CD.shape
    scale = (_LOG2_E / t).reshape(1)
    bias_C = batch.bias_C * _LOG2_E
    num_words = -(-num_candidates // 32)
    loss = bias_C.new_zeros(())
    d_q = bias_C.new_empty(q_QD.shape) if with_gradients else None
    d_c = bias_C.new_zeros(c_CD.shape) if with_gradients else None
    d_own = torch.empty_like(own) if with_gradients and own is not None else None
    # The largest tiles that fit the registers at D = 128 (ptxas for compute capability 8.0 and 9.0).
    tile = 32 if q_QD.dtype == torch.float32 else 64
    sizes = {"D": dim, "D_PADDED": max(16, triton.next_power_of_2(dim)), "TILE": tile}
    sizes |= {"PRECISION": "tf32x3", "num_warps": 4, "num_stages": 2}
    rows = max(tile, _BITS_BYTES // (4 * num_words) // tile * tile)
    for first in range(0, len(q_QD), rows):
        last = min(first + rows, len(q_QD))
        q_RD, weight_R, positive_R = (
            q_QD[first:last],
            batch.weight_Q[first:last],
            batch.positive_Q[first:last].contiguous(),
        )
        words_RW = _left_out_words(batch.left_out, num_words, positive_R, first, last)
        lse_R, mean_RD = bias_C.new_empty(last - first), bias_C.new_empty(q_RD.shape if with_gradients else 1)
        matrix = (q_RD, c_CD, scale, bias_C, words_RW)
        ends = (last - first, num_words, num_candidates)
        _over_candidates[(triton.cdiv(last - first, tile),)](
            *matrix, lse_R, mean_RD, *ends, **sizes, WITH_MEAN=with_gradients
        )
        right_RD = c_CD[positive_R].float()
        right_R = (q_RD.float() * right_RD).sum(1) * scale + bias_C[positive_R]
        all_R = lse_R
        if own is not None and batch.own_bias_QH is not None:
            own_RH = torch.einsum("rd,rhd->rh", q_RD.float() * scale, own[first:last])
            own_RH += batch.own_bias_QH[first:last] * _LOG2_E
            all_R = torch.logaddexp2(lse_R, own_RH.mul_(1 / _LOG2_E).logsumexp(1) * _LOG2_E)
        padding_R = weight_R == 0
        loss += ((all_R - right_R) * weight_R).masked_fill_(padding_R, 0).sum() / _LOG2_E
        if d_q is None or d_c is None:
            continue
        all_R = all_R.masked_fill(padding_R, math.inf)  # a softmax of zeros there
        d_RD = mean_RD.mul_((lse_R - all_R).exp2_()[:, None]).sub_(right_RD)
        scale_R1 = weight_R[:, None] / t
        if own is not None and d_own is not None:
            p_RH = (own_RH - all_R[:, None] / _LOG2_E).exp_()
            d_RD += torch.einsum("rh,rhd->rd", p_RH, own[first:last])
            d_own[first:last] = (p_RH * scale_R1)[:, :, None] * q_RD.float()[:, None, :]
        torch.mul(d_RD, scale_R1, out=d_q[first:last])
        _over_queries[(triton.cdiv(num_candidates, tile),)](
            *matrix, all_R, positive_R, scale_R1, d_c, *ends, **sizes
        )
    if d_q is None or d_c is None:
        return loss, ()
    # dloss/dt = sum over logits of dloss/dlogit x (-score / t^2) = -(queries . d_queries) / t.
    d_t = -(q_QD * d_q).sum() / t
    return loss, (
        d_q.to(queries_QD.dtype),
        d_c.to(candidates_CD.dtype),
        d_t.to(temperature.dtype),
        None if d_own is None or own_QHD is None else d_own.to(own_QHD.dtype),
    )


def _left_out_words(left_out: LeftOut, num_words: int, positive_R: Tensor, first: int, last: int) -> Tensor:
    """Return the bits of what queries [first, last) leave out, [R, W] int32; their positives stay."""
    words_RW = torch.zeros(last - first, num_words, dtype=torch.int32, device=positive_R.device)
    for row, column in left_out.pairs(first, last):
        _set_bits[(triton.cdiv(len(row), 1024),)](
            words_RW, row, column, len(row), num_words, CLEAR=False, BLOCK=1024
        )
    row = torch.arange(last - first, device=positive_R.device)
    _set_bits[(triton.cdiv(len(row), 1024),)](
        words_RW, row, positive_R, len(row), num_words, CLEAR=True, BLOCK=1024
    )
    return words_RW

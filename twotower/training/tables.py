"""Embedding tables in training: look up the rows of a batch, reduce their gradients, update only them.

A step touches U distinct rows of a table, so its cost is O(batch) and not O(table). Ids and gradient rows
are gathered over ranks and summed by id, so that every rank applies the same update to its copy. All sums
are taken in one order, so the same run gives the same bits.

Shapes: U touched rows, E width of a table, R rows of a table, B rows of a batch, L ids of a bag, T tables,
W world size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from twotower.model.batch import Bag
from twotower.model.dropout import row_keys, uniform
from twotower.model.towers import pool
from twotower.training.collectives import World, gather

TableKind = Literal["lazy_adam", "rowwise_adagrad"]
RowGradient = tuple[torch.Tensor, torch.Tensor]
"""Distinct ids [U] int64, ascending, and their gradient rows [U, E] float32."""

_ROUNDING_STREAM = 1 << 33
"""Streams of ``row_keys`` from here on are for rounding, one for each table."""
_DIRECT_ROWS_PER_ID = 8
"""A table of up to so many rows for each id looked up has an array from row to place: 64 bytes an id."""

_BLOCK_ROWS = 1024
"""Rows that are updated at a time on a CPU, so that what is computed of them stays in its cache."""


class TouchedRows:
    """The rows that one batch reads, in float32, and the gradients that reach them."""

    def __init__(self, tables: Mapping[str, torch.Tensor], bags: Sequence[tuple[str, Bag]]) -> None:
        """Read the distinct rows.

        Args:
            tables: by name, [R, E], of any floating type.
            bags: (table name, bag) of everything that the batch looks up.
        """
        self._ids: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._places: dict[str, torch.Tensor] = {}
        for name in sorted({name for name, _ in bags}):
            table = tables[name].detach()
            flat = torch.cat([bag.ids.flatten() for other, bag in bags if other == name])
            ids = torch.unique(flat[flat >= 0])
            self._ids[name] = ids
            self._rows[name] = table.index_select(0, ids).float().requires_grad_()
            self._gradients[name] = torch.zeros_like(self._rows[name], requires_grad=False)
            if len(table) <= _DIRECT_ROWS_PER_ID * len(flat):
                place = torch.empty(len(table), dtype=torch.int64, device=ids.device)
                self._places[name] = place.index_copy_(0, ids, torch.arange(len(ids), device=ids.device))

    def lookup(self, name: str, bag: Bag) -> torch.Tensor:
        """Return pooled embeddings [B, E] float32; backward adds to the gradients of the rows it reads.

        Args:
            name: of the table.
            bag: given at construction, or made of rows of such a bag.
        """
        ids, rows = self._ids[name], self._rows[name]
        if len(ids) == 0:
            return rows.new_zeros(bag.ids.shape[0], rows.shape[1])
        # Padding reads a touched row with weight 0.
        known = torch.where(bag.ids >= 0, bag.ids, ids[0])
        if name in self._places:
            local = self._places[name].index_select(0, known.flatten()).view_as(known)
        else:
            local = torch.searchsorted(ids, known)
        out: torch.Tensor = _Pool.apply(rows, local, bag.weights, self._gradients[name])
        return out

    def gradients(self, world: World) -> dict[str, RowGradient]:
        """Return the sum over ranks of every touched row's gradient, by table; the same on every rank.

        Collective: all ranks, after backward, with bags of the same tables.
        """
        if world.size == 1:
            return {name: (ids, self._gradients[name]) for name, ids in self._ids.items()}
        ids_T, grads_T = list(self._ids.values()), list(self._gradients.values())
        # Three collectives, however many tables there are.
        counts = torch.tensor([[len(ids) for ids in ids_T]], device=world.device)
        counts_WT = gather(counts, world).tolist()
        widths_T = [grads.shape[1] for grads in grads_T]
        values_WT = [[n * e for n, e in zip(counts_T, widths_T, strict=True)] for counts_T in counts_WT]
        ids_TW = _gather_pieces(ids_T, counts_WT, world)
        values_TW = _gather_pieces([grads.flatten() for grads in grads_T], values_WT, world)
        out = {}
        for name, ids_W, values_W, width in zip(self._ids, ids_TW, values_TW, widths_T, strict=True):
            ids, rows = torch.cat(ids_W), torch.cat(values_W).view(-1, width)
            out[name] = _sum_by_id(ids[:, None], rows, rows.new_ones(len(ids), 1))
        return out


class _Pool(torch.autograd.Function):
    """``pool``, with a backward whose cost is that of its bags, also where other bags touch more rows.

    torch's own backward of a weighted bag adds one id after the other, into a gradient of all touched rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_UE: torch.Tensor,
        local_BL: torch.Tensor,
        weights_BL: torch.Tensor,
        sums_UE: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(local_BL, weights_BL)
        ctx.sums_UE = sums_UE
        return pool(rows_UE, local_BL, weights_BL)

    @staticmethod
    def backward(ctx: Any, grad_BE: torch.Tensor) -> tuple[None, None, None, None]:
        local_BL, weights_BL = ctx.saved_tensors
        local, grads = _sum_by_id(local_BL, grad_BE, weights_BL)
        ctx.sums_UE.index_add_(0, local, grads)
        return None, None, None, None


def _sum_by_id(ids_BL: torch.Tensor, rows_BE: torch.Tensor, weights_BL: torch.Tensor) -> RowGradient:
    """Return the distinct ids, ascending, and for each the weighted sum of the rows that have it."""
    ordered, order = torch.sort(ids_BL.flatten(), stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    sums = F.embedding_bag(
        order // ids_BL.shape[1],
        rows_BE.contiguous(),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=weights_BL.flatten().index_select(0, order),
    )
    return distinct, sums


def _gather_pieces(
    pieces_T: list[torch.Tensor], sizes_WT: list[list[int]], world: World
) -> list[list[torch.Tensor]]:
    """Return every rank's pieces in one collective, by piece and then by rank.

    Args:
        pieces_T: this rank's, one-dimensional.
        sizes_WT: of all ranks' pieces.
        world: this process's place.
    """
    longest = max(map(sum, sizes_WT))
    flat = torch.cat(pieces_T)
    everyone = gather(F.pad(flat, (0, longest - len(flat))), world).view(world.size, longest)
    by_rank = [row[: sum(sizes)].split(sizes) for row, sizes in zip(everyone, sizes_WT, strict=True)]
    return [list(piece_W) for piece_W in zip(*by_rank, strict=True)]


class TableOptimizer:
    """Updates the touched rows of embedding tables; state of untouched rows does not change.

    Updates are computed in float32. A table of lower precision is written back with stochastic rounding,
    because most updates are smaller than half the distance of its neighbouring values. State is float32
    throughout: the second moment moves by a thousandth a step, which bfloat16 can not hold. Where that is
    too much memory, rowwise_adagrad needs four bytes a row.
    """

    def __init__(
        self,
        tables: Mapping[str, torch.Tensor],
        kind: TableKind,
        seed: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        """Make fresh state: two moments [R, E] for lazy_adam, one sum [R] for rowwise_adagrad.

        Args:
            tables: by name, [R, E]; updated in place.
            kind: of optimiser.
            seed: of the rounding of tables of lower precision.
            weight_decay: each touched row is first multiplied by 1 - learning rate x this.

        Source: Duchi, Hazan, Singer: Adaptive subgradient methods (2011), with one sum for a row;
            Kingma, Ba: Adam (2015), algorithm 1, with moments that only move when their row is touched;
            Loshchilov, Hutter: Decoupled weight decay regularization (ICLR 2019), algorithm 2, for the decay.
        """
        self._tables = dict(tables)
        self._kind = kind
        self._seed = seed
        self._weight_decay = weight_decay
        self._steps = 0
        self._state: dict[str, torch.Tensor] = {}
        for name, table in self._tables.items():
            if kind == "lazy_adam":
                self._state[f"{name}.first"] = torch.zeros_like(table, dtype=torch.float32)
                self._state[f"{name}.second"] = torch.zeros_like(table, dtype=torch.float32)
            else:
                self._state[f"{name}.sum"] = torch.zeros_like(table[:, 0], dtype=torch.float32)

    @torch.no_grad()
    def step(
        self, gradients: Mapping[str, RowGradient], learning_rate: float, scale: float | torch.Tensor = 1.0
    ) -> None:
        """Apply one update.

        Args:
            gradients: those of ``TouchedRows.gradients``.
            learning_rate: of this step.
            scale: the gradients are multiplied by it, as clipping needs.
        """
        self._steps += 1
        for number, (name, table) in enumerate(self._tables.items()):
            if name not in gradients:
                continue
            ids, grad = gradients[name]
            each = _BLOCK_ROWS if table.device.type == "cpu" else max(len(ids), 1)
            for ids_b, grad_b in zip(ids.split(each), grad.split(each), strict=True):
                update = self._adam if self._kind == "lazy_adam" else self._adagrad
                rows = table.index_select(0, ids_b).float()
                if self._weight_decay:
                    rows.mul_(1 - learning_rate * self._weight_decay)
                rows.sub_(update(name, ids_b, grad_b * scale).mul_(learning_rate))
                if table.dtype != torch.float32:
                    keys = row_keys(self._seed, self._steps, ids_b, _ROUNDING_STREAM + number)
                    rows = round_stochastically(rows, table.dtype, keys)
                table.index_copy_(0, ids_b, rows)

    def _adam(self, name: str, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        first, second = self._state[f"{name}.first"], self._state[f"{name}.second"]
        m = first.index_select(0, ids).lerp_(grad, 1 - beta1)
        v = second.index_select(0, ids).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        first.index_copy_(0, ids, m)
        second.index_copy_(0, ids, v)
        m.div_(1 - beta1**self._steps)
        v.div_(1 - beta2**self._steps)
        return m.div_(v.sqrt_().add_(eps))

    def _adagrad(self, name: str, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        state = self._state[f"{name}.sum"]
        total = state.index_select(0, ids) + grad.square().mean(1)
        state.index_copy_(0, ids, total)
        return grad / (total.sqrt().unsqueeze(1) + 1e-8)

    def state_dict(self) -> dict[str, object]:
        """Return the state for a checkpoint."""
        return {"steps": self._steps, "state": dict(self._state)}

    def load_state_dict(self, saved: dict[str, object]) -> None:
        """Restore what ``state_dict`` returned."""
        state = saved["state"]
        assert isinstance(state, dict)
        assert isinstance(saved["steps"], int)
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
        self._steps = saved["steps"]


def round_stochastically(x_UE: torch.Tensor, dtype: torch.dtype, keys_U: torch.Tensor) -> torch.Tensor:
    """Return x in a narrower type, rounded to one of its two neighbours there, so that its mean stays.

    A value that the narrower type holds comes out as it is.

    Args:
        x_UE: [U, E] float32.
        dtype: bfloat16 or float16.
        keys_U: [U] int64, from ``row_keys``; what is rounded up is a function of key and column.
    """
    info = torch.finfo(dtype)
    # The largest power of two in |x| is its exponent bits alone. Neighbours do not come closer than those
    # of the smallest normal number; no finer than 2**-100, so that nothing here is a float32 subnormal.
    binade = (x_UE.view(torch.int32) & 0x7F80_0000).view(torch.float32)
    spacing = binade.clamp(min=max(info.smallest_normal, 2.0**-100)) * info.eps
    # As many random bits as rounding drops: the sum is exact.
    bits = 23 + int(math.log2(info.eps))
    return (torch.floor(x_UE / spacing + uniform(keys_U, x_UE.shape[1], bits=bits)) * spacing).to(dtype)

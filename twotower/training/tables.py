"""Embedding tables in training: look up the rows of a batch, reduce their gradients, update only them.

A step touches U distinct rows of a table, so its cost is O(batch) and not O(table). Ids and gradient rows
are gathered over ranks and summed by id, so that every rank applies the same update to its copy.

Shapes: U touched rows, E width of a table, R rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from twotower.model.features import Bag
from twotower.model.towers import pool
from twotower.training.collectives import World, gather_ragged

TableKind = Literal["lazy_adam", "rowwise_adagrad"]
RowGradient = tuple[torch.Tensor, torch.Tensor]
"""Distinct ids [U] int64, ascending, and their gradient rows [U, E] float32."""


class TouchedRows:
    """The rows that one batch reads, as leaves of its graph."""

    def __init__(self, tables: Mapping[str, torch.Tensor], bags: list[tuple[str, Bag]]) -> None:
        """Look up the distinct rows.

        Args:
            tables: by name, [R, E].
            bags: (table name, bag) of everything that the batch looks up.
        """
        self._ids: dict[str, torch.Tensor] = {}
        self._rows: dict[str, torch.Tensor] = {}
        for name in sorted({name for name, _ in bags}):
            flat = torch.cat([bag.ids.flatten() for other, bag in bags if other == name])
            ids = torch.unique(flat[flat >= 0])
            self._ids[name] = ids
            self._rows[name] = tables[name].detach()[ids].requires_grad_()

    def lookup(self, name: str, bag: Bag) -> torch.Tensor:
        """Return pooled embeddings [B, E] with gradient to the touched rows."""
        ids, rows = self._ids[name], self._rows[name]
        if len(ids) == 0:
            return rows.new_zeros(bag.ids.shape[0], rows.shape[1])
        # Padding reads row 0 with weight 0: a touched row anyway, which gets a zero gradient from it.
        local = torch.searchsorted(ids, bag.ids.clamp(min=0)).clamp(max=len(ids) - 1)
        return pool(rows, torch.where(bag.ids >= 0, local, 0), bag.weights)

    def gradients(self, world: World) -> dict[str, RowGradient]:
        """Return the mean over ranks of every touched row's gradient, by table; the same on every rank.

        Collective: all ranks, after backward.
        """
        out = {}
        for name, rows in self._rows.items():
            grad = rows.grad if rows.grad is not None else torch.zeros_like(rows)
            ids = gather_ragged(self._ids[name], world)
            grads = gather_ragged(grad, world)
            distinct, place = torch.unique(ids, return_inverse=True)
            summed = grads.new_zeros(len(distinct), grads.shape[1]).index_add_(0, place, grads)
            out[name] = (distinct, summed / world.size)
        return out


class TableOptimizer:
    """Updates the touched rows of embedding tables; state of untouched rows does not change."""

    def __init__(self, tables: Mapping[str, torch.Tensor], kind: TableKind) -> None:
        """Make fresh state: two moments [R, E] for lazy_adam, one sum [R] for rowwise_adagrad.

        Source: Duchi, Hazan, Singer: Adaptive subgradient methods (2011), with one sum for a row;
            Kingma, Ba: Adam (2015), algorithm 1, with moments that only move when their row is touched.
        """
        self._tables = dict(tables)
        self._kind = kind
        self._steps = 0
        self._state: dict[str, torch.Tensor] = {}
        for name, table in self._tables.items():
            if kind == "lazy_adam":
                self._state[f"{name}.first"] = torch.zeros_like(table)
                self._state[f"{name}.second"] = torch.zeros_like(table)
            else:
                self._state[f"{name}.sum"] = torch.zeros_like(table[:, 0])

    @torch.no_grad()
    def step(self, gradients: Mapping[str, RowGradient], learning_rate: float) -> None:
        """Apply one update; the gradients are those of ``TouchedRows.gradients``."""
        self._steps += 1
        for name, (ids, grad) in gradients.items():
            update = (
                self._adam(name, ids, grad) if self._kind == "lazy_adam" else self._adagrad(name, ids, grad)
            )
            self._tables[name].index_add_(0, ids, update, alpha=-learning_rate)

    def _adam(self, name: str, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        first = self._state[f"{name}.first"]
        second = self._state[f"{name}.second"]
        m = first[ids].lerp_(grad, 1 - beta1)
        v = second[ids].lerp_(grad.square(), 1 - beta2)
        first[ids], second[ids] = m, v
        m_hat = m / (1 - beta1**self._steps)
        v_hat = v / (1 - beta2**self._steps)
        return m_hat / (v_hat.sqrt_().add_(eps))

    def _adagrad(self, name: str, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        state = self._state[f"{name}.sum"]
        total = state[ids] + grad.square().mean(1)
        state[ids] = total
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

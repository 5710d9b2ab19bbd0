"""What the workers of a run exchange. A single process is world size 1, not another branch.

Every function here is a collective: all ranks call it, in the same order, with the shapes it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place among the workers."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device | None = None) -> World:
        """Return the place in torch's default process group, or alone where there is none."""
        device = device or torch.device("cpu")
        if not (dist.is_available() and dist.is_initialized()):
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def share(self, total: int) -> tuple[int, int]:
        """Return this rank's [begin, end) of ``total`` rows cut into equal shares, the last ones shorter."""
        each = -(-total // self.size)
        return min(self.rank * each, total), min((self.rank + 1) * each, total)


def gather(x: torch.Tensor, world: World) -> torch.Tensor:
    """Return all ranks' rows in rank order, [W b, ...], without gradient.

    Args:
        x: [b, ...], the same b on every rank.
        world: this process's place.
    """
    if world.size == 1:
        return x
    out = x.new_empty((world.size * x.shape[0], *x.shape[1:]))
    _all_gather(out, x.contiguous())
    return out


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        return gather(x, world)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        world: World = ctx.world
        out = grad.new_empty((grad.shape[0] // world.size, *grad.shape[1:]))
        _reduce_scatter(out, grad.contiguous())
        return out, None


def gather_with_gradient(x: torch.Tensor, world: World) -> torch.Tensor:
    """Return all ranks' rows in rank order, [W b, ...].

    Gradient: a row's gradient on its own rank is the sum over ranks of the gradients of its copies. The sum
    over ranks of the parameters' gradients then is the gradient of the sum of the ranks' losses.
    """
    if world.size == 1:
        return x
    gathered: torch.Tensor = _GatherWithGradient.apply(x, world)
    return gathered


def gather_ragged(x: torch.Tensor, world: World) -> torch.Tensor:
    """Return all ranks' rows in rank order where ranks hold different numbers of rows, without gradient."""
    if world.size == 1:
        return x
    counts = gather(torch.tensor([x.shape[0]], device=x.device), world).tolist()
    longest = max(counts)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    everyone = gather(padded, world).reshape(world.size, longest, *x.shape[1:])
    return torch.cat([everyone[r, :n] for r, n in enumerate(counts)])


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        return sum_over_ranks(x.clone(), world)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_over_ranks(grad.clone(), ctx.world), None


def sum_with_gradient(x: torch.Tensor, world: World) -> torch.Tensor:
    """Return the sum of ``x`` over ranks; its gradient is the sum over ranks of the gradients of that sum."""
    if world.size == 1:
        return x
    summed: torch.Tensor = _SumWithGradient.apply(x, world)
    return summed


def reduce_gradients(
    parameters: Sequence[torch.nn.Parameter], scalars: torch.Tensor, world: World
) -> torch.Tensor:
    """Replace every parameter's gradient by its sum over ranks, and return that of ``scalars``.

    All of it goes through one flat buffer in the order of the parameters, in one collective: the sums are
    the same bits in every run and after every restart. A missing gradient counts as zeros.

    Args:
        parameters: of one dtype, in the same order on all ranks.
        scalars: [S], what else is summed in the same collective.
        world: this process's place.
    """
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if world.size > 1:
        flat = torch.cat([g.reshape(-1) for g in grads] + [scalars.to(grads[0].dtype)])
        sum_over_ranks(flat, world)
        pieces = flat.split([g.numel() for g in grads] + [len(scalars)])
        grads = [piece.view_as(g) for piece, g in zip(pieces, grads, strict=False)]
        scalars = pieces[-1]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return scalars


def sum_over_ranks(x: torch.Tensor, world: World) -> torch.Tensor:
    """Return the sum of ``x`` over ranks; ``x`` itself is changed."""
    if world.size > 1:
        dist.all_reduce(x)
    return x


def _all_gather(out: torch.Tensor, x: torch.Tensor) -> None:
    # Newer names of the same collectives; torch 2.13 warns about the older ones.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(out, x)


def _reduce_scatter(out: torch.Tensor, x: torch.Tensor) -> None:
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(out, x)

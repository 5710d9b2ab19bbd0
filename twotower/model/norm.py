"""Batch normalisation whose statistics are those of the global batch, padding left out.

The sums go through ``all_reduce``: the identity in one process, a differentiable sum over ranks in training,
so that any number of workers normalises as one process would. torch's SyncBatchNorm refuses the CPU and
knows no padding.

Shapes: B rows of this rank's share, E width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]
"""Returns the sum of a tensor over ranks; its gradient is again a sum over ranks."""


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over the valid rows of all ranks.

    Equals ``torch.nn.BatchNorm1d`` on the valid rows of the global batch: it normalises with the biased
    variance and keeps the unbiased one in its running statistics.

    Collective: in training, all ranks, twice forward and twice backward.

    Source: Ioffe, Szegedy: Batch normalization (2015), algorithm 1.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        """Start as the identity on data of mean 0 and variance 1.

        Args:
            width: E.
            momentum: weight of a new batch in the running statistics, in (0, 1].
            eps: added to the variance.
        """
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.all_reduce: SumOverRanks = _alone
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return [B, E] of x's dtype; rows that are not valid are normalised too, but are in no statistic.

        Args:
            x: [B, E].
            valid: [B] bool; all rows when not given.
        """
        dtype, x = x.dtype, x.float()
        if self.training:
            mean, variance = self._batch_statistics(x, valid)
        else:
            mean, variance = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((x - mean) * scale + self.bias).to(dtype)

    def _batch_statistics(
        self, x: torch.Tensor, valid: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counted = x.new_ones(len(x), 1) if valid is None else valid.to(x.dtype)[:, None]
        sums = self.all_reduce(torch.cat([(x * counted).sum(0), counted.sum(0)]))
        count = sums[-1]
        mean = sums[:-1] / count
        # A second sum around the mean: mean(x^2) - mean^2 cancels where the mean is large.
        variance = self.all_reduce(((x - mean).square() * counted).sum(0)) / count
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return mean, variance


def _alone(x: torch.Tensor) -> torch.Tensor:
    return x

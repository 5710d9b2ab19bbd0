"""Dropout whose masks are a function of (seed, step, global row), for any number of workers and chunks.

A counter-based generator (two rounds of a 64-bit multiply and xor-shift mix) turns a row's key and the
column number into a uniform number, so a row gets the same mask wherever it is computed.
"""

from __future__ import annotations

import torch
from torch import nn

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_ONES = (1 << 64) - 1


def mix(x: torch.Tensor) -> torch.Tensor:
    """Return the splitmix64 finaliser of an int64 tensor.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014), figure 16.
    """
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def row_keys(seed: int, step: int, rows: torch.Tensor, stream: int) -> torch.Tensor:
    """Return the keys [B] int64 of rows.

    Args:
        seed: of the run.
        step: optimiser step.
        rows: [B] int64, row numbers in the global batch.
        stream: keeps uses apart that share (seed, step, row), such as the two towers.
    """
    key = 0
    for part in (seed, stream, step):
        key = _mix_one(key + part + _GOLDEN)
    return mix(key + (rows + 1) * _GOLDEN)


def _mix_one(x: int) -> int:
    """``mix`` of one number, without the cost of a tensor's operations."""
    x &= _ONES
    x = (x ^ x >> 30) * _MIX_1 & _ONES
    x = (x ^ x >> 27) * _MIX_2 & _ONES
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


def uniform(keys: torch.Tensor, columns: int, stream: int = 0, bits: int = 24) -> torch.Tensor:
    """Return uniform numbers in [0, 1), [B, columns] float32, a function of each row's key.

    Args:
        keys: [B] int64, from ``row_keys``.
        columns: how many for each row.
        stream: keeps uses apart that share a key.
        bits: the numbers are multiples of 2**-bits; at most 24, which float32 holds.
    """
    counter = torch.arange(1, columns + 1, device=keys.device, dtype=torch.int64)
    # Wrapped here: a compiler multiplies constants without a limit, and then has no 64-bit number.
    offset = stream * (1 << 32) * _GOLDEN & _ONES
    offset -= (offset >> 63) << 64
    random = mix(keys[:, None] + (counter * _GOLDEN + offset))
    return _shift(random, 64 - bits).to(torch.float32) * 2.0**-bits


def column_keys(keys: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return keys for the columns of rows, [...] int64: of an item of a sequence, with the sequence's key.

    Args:
        keys: [...] int64, from ``row_keys``.
        columns: [...] int64, at least 0.
    """
    return mix(keys + (columns + 1) * _GOLDEN)


class RowDropout(nn.Module):
    """Dropout at a rate, with the masks of ``uniform``; off without keys."""

    def __init__(self, rate: float, stream: int) -> None:
        """Keep the rate, and the stream that sets this layer's masks apart from another layer's."""
        super().__init__()
        self.rate = rate
        self.stream = stream

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """Return [B, E], scaled by 1 / (1 - rate) where kept.

        Args:
            x: [B, E].
            keys: [B] int64 or None, from ``row_keys``.
        """
        if keys is None or self.rate == 0.0 or not self.training:
            return x
        keep = uniform(keys, x.shape[1], self.stream) >= self.rate
        return x * keep * (1.0 / (1.0 - self.rate))

"""Hashed embedding tables: an id reads several shared rows instead of one of its own.

The embedding of an id is the sum of its rows. A sum and not a mean: the gradient of each row then is that of
the embedding, as with a row for each id, so that the same learning rate fits both.

Source: Svenstrup, Hansen, Winther: Hash embeddings for efficient word representations (2017), section 2,
    with importance weights of 1.
"""

from __future__ import annotations

import torch

from twotower.model.dropout import row_keys
from twotower.schema import UNKNOWN_ROW

_SEED = 0x7477_6F74
_STREAM = 1 << 32


def hashed_rows(rows: torch.Tensor, buckets: int, hashes: int) -> torch.Tensor:
    """Return the table rows that dense rows read, [..., hashes] int64 in [1, buckets].

    Row ``UNKNOWN_ROW`` of the table is left to the unknown id. A function of its arguments alone: training,
    encoding and serving agree without exchanging anything.

    Args:
        rows: [...] int64, rows of users or items.
        buckets: rows of the table beside the unknown one.
        hashes: rows that each id reads; two of them may be the same.
    """
    keys = [row_keys(_SEED, hash_number, rows, _STREAM) for hash_number in range(hashes)]
    # One bit is dropped, so that the remainder is that of a number >= 0.
    shared: torch.Tensor = ((torch.stack(keys, dim=-1) >> 1) & ((1 << 63) - 1)) % buckets
    return shared + UNKNOWN_ROW + 1

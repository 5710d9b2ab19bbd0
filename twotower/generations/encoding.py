"""Items of a catalogue and users of a generation through the towers of a checkpoint. Runs without Ray.

Symbols: D embedding_dim, n items, Q queries.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from twotower.data.dataset import ITEM_ROW
from twotower.generations.generation import Generation
from twotower.model.batch import to_device
from twotower.model.checkpoint import Checkpoint
from twotower.model.features import QueryFeatures, encode_columns, item_batch

_QUERY_BATCH = 1_024


def encode_table(checkpoint: Checkpoint, table: pa.Table, device: str = "cpu") -> npt.NDArray[np.float32]:
    """Return the vectors of a table of items with their item rows, [n, D] float32.

    Rows that the towers were not trained with, of items that came later, have the unknown id.
    """
    schema = checkpoint.schema
    columns = encode_columns(schema.item, table)
    rows = table[ITEM_ROW].to_numpy()
    batch = item_batch(schema, np.where(rows < schema.num_items, rows, -1), columns)
    vectors = checkpoint.model.encode_items(to_device(batch, torch.device(device)))
    return np.asarray(vectors.float().cpu().numpy())


def real_queries(
    tables: Generation, checkpoint: Checkpoint, count: int, seed: int
) -> npt.NDArray[np.float32]:
    """Return the query embeddings of users drawn from those with a history, as of now, [Q, D] float32.

    Args:
        tables: whose users; it needs no shards and no manifest yet.
        checkpoint: its query tower encodes.
        count: the most users drawn.
        seed: of the draw.
    """
    schema, histories, columns = checkpoint.schema, tables.histories, tables.user_columns
    users = np.flatnonzero(np.diff(histories.offsets))
    if len(users) == 0:
        users = np.arange(len(tables.user_ids))
    users = np.random.default_rng(seed).permutation(users)[:count]
    features = QueryFeatures(schema, tables.profiles)
    vectors = []
    for start in range(0, len(users), _QUERY_BATCH):
        rows = users[start : start + _QUERY_BATCH]
        past = histories.before(rows, None, schema.max_history)
        times = histories.times_before(rows, None, schema.max_history) if schema.time_gaps else None
        batch = features(rows, {name: column[rows] for name, column in columns.items()}, *past, times)
        vectors.append(checkpoint.model.encode_queries(batch).numpy())
    return np.concatenate(vectors)

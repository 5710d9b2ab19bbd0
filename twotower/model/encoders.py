"""Encoders of histories as sequences: attention pooling, and a causal transformer.

One pass over a stretch of items, oldest first, gives a vector at each of its items: the embedding of a
history that ends there. What is behind an item changes nothing of it, so training reads a stretch at many
items, and serving reads it at its last one.

Shapes: B queries, R rows of the grid, T its width, N = R T, E width of the embeddings, A attention heads,
L the longest stretch, F width of the feed-forward layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from twotower.model.batch import Sequences
from twotower.model.dropout import RowDropout, column_keys
from twotower.model.sequences import NUM_GAPS
from twotower.schema import HistoryFeature


def make_encoder(spec: HistoryFeature, std: float) -> nn.Module:
    """Return the freshly initialised encoder of a history feature.

    Args:
        spec: with the pooling ``attention`` or ``transformer``.
        std: standard deviation of its initial weights.
    """
    if spec.pooling == "attention":
        return AttentionPooling(spec.dim, spec.max_length, spec.decay)
    return Transformer(
        spec.dim,
        spec.max_length,
        spec.transformer.blocks,
        spec.transformer.heads,
        spec.transformer.feed_forward,
        spec.transformer.dropout,
        std,
        spec.transformer.time_gaps,
    )


def visible(sequences: Sequences) -> torch.Tensor:
    """Return which items an item sees, [R, T, T] bool: itself and the earlier ones of its stretch.

    Padding sees padding, so that no row of the mask is empty; nobody reads what comes of it.
    """
    stretch = sequences.stretch
    same = stretch[:, :, None] == stretch[:, None, :]
    return same.tril_()


def read_out(x_NE: torch.Tensor, sequences: Sequences, nothing_E: torch.Tensor) -> torch.Tensor:
    """Return what each query reads [B, E]: x at its place, and ``nothing_E`` for one that knows nothing."""
    read = sequences.read
    nothing_E = nothing_E.to(x_NE.dtype)
    if not len(x_NE):
        return nothing_E.expand(len(read), -1)
    return torch.where(read[:, None] < 0, nothing_E, x_NE.index_select(0, read.clamp(min=0)))


class AttentionPooling(nn.Module):
    """The weighted mean of a history's items, with weights that are learned: softmax(q . item + b[distance]).

    q is a learned vector over items scaled to one length, and b a learned number for each distance from the
    latest item. It begins as the pooling ``recency``.

    Source: Yang et al.: Hierarchical attention networks for document classification (NAACL 2016), equations
        8 to 10, without their inner layer and with a bias by distance.
    """

    def __init__(self, width: int, length: int, decay: float) -> None:
        """Build it.

        Args:
            width: E.
            length: L.
            decay: initial weight of an item relative to the next later one, in (0, 1].
        """
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))
        self.distance = nn.Parameter(torch.arange(length) * math.log(decay))
        self.nothing = nn.Parameter(torch.zeros(width))

    def forward(self, items_NE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Return the embeddings of the queries' histories, [B, E] of the items' type.

        Args:
            items_NE: embeddings of the grid's items, zeros at padding.
            sequences: the grid.
        """
        if not len(items_NE):
            return read_out(items_NE, sequences, self.nothing)
        rows, width = sequences.stretch.shape
        scores = (F.layer_norm(items_NE, items_NE.shape[1:]) @ self.query).view(rows, 1, width)
        places = torch.arange(width, device=items_NE.device)
        distance = (places[:, None] - places[None, :]).clamp(0, len(self.distance) - 1)
        logits = (scores + self.distance[distance]).masked_fill(~visible(sequences), -math.inf)
        pooled = torch.softmax(logits.float(), dim=-1).to(items_NE.dtype) @ items_NE.view(rows, width, -1)
        return read_out(pooled.flatten(0, 1), sequences, self.nothing)


class Transformer(nn.Module):
    """A causal transformer, normalised before each layer, with a learned vector for each place in a stretch.

    Source: Kang, McAuley: Self-attentive sequential recommendation (ICDM 2018), with the layers of Radford et
        al.: Language models are unsupervised multitask learners (2019), section 2.3.
    """

    def __init__(
        self,
        width: int,
        length: int,
        blocks: int,
        heads: int,
        feed_forward: int,
        dropout: float,
        std: float,
        time_gaps: bool = False,
    ) -> None:
        """Build the layers.

        Args:
            width: E.
            length: L.
            blocks: number of attention and feed-forward layers, one of each a block.
            heads: A, divides E.
            feed_forward: F / E.
            dropout: rate on the embeddings and on what each layer adds.
            std: of the initial weights.
            time_gaps: add a learned vector for the time between an item and the one before it.
        """
        super().__init__()
        self.positions = nn.Parameter(torch.empty(length, width).normal_(std=std))
        self.gaps = nn.Parameter(torch.empty(NUM_GAPS, width).normal_(std=std)) if time_gaps else None
        self.dropout = RowDropout(dropout, stream=0)
        self.blocks = nn.ModuleList(
            Block(width, heads, feed_forward * width, dropout, 1 + 2 * i, std) for i in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.nothing = nn.Parameter(torch.empty(width).normal_(std=std))

    def forward(self, items_NE: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Return the embeddings of the queries' histories, [B, E].

        Args:
            items_NE: embeddings of the grid's items, zeros at padding.
            sequences: the grid.
        """
        if not len(items_NE):
            return self.norm(read_out(items_NE, sequences, self.nothing))
        keys_N = None
        if sequences.keys is not None:
            keys_N = column_keys(sequences.keys, sequences.position).flatten()
        x_NE = items_NE + self.positions.index_select(0, sequences.position.flatten())
        if self.gaps is not None:
            assert sequences.gap is not None
            x_NE = x_NE + self.gaps.index_select(0, sequences.gap.flatten())
        if keys_N is not None:
            x_NE = self.dropout(x_NE, keys_N)
        # Where a row is one stretch, all that an item must not see is behind it.
        mask = None if sequences.alone else visible(sequences)[:, None]
        shape = sequences.stretch.shape
        for block in self.blocks:
            x_NE = block(x_NE, shape, mask, keys_N)
        return self.norm(read_out(x_NE, sequences, self.nothing))


class Block(nn.Module):
    """Attention and a feed-forward layer, each over normalised inputs and added to them."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, stream: int, std: float) -> None:
        """Build the layers.

        Args:
            width: E.
            heads: A.
            hidden: F.
            dropout: rate on what each of the two layers adds.
            stream: of its dropout masks, which take this one and the next.
            std: of the initial weights.
        """
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.attention_dropout = RowDropout(dropout, stream)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, hidden)
        self.feed_forward_out = nn.Linear(hidden, width)
        self.feed_forward_dropout = RowDropout(dropout, stream + 1)
        for layer in (self.attention_in, self.attention_out, self.feed_forward_in, self.feed_forward_out):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x_NE: torch.Tensor,
        shape: torch.Size,
        mask_R1TT: torch.Tensor | None,
        keys_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return [N, E].

        Args:
            x_NE: the grid's items.
            shape: (R, T).
            mask_R1TT: which items an item sees; itself and those before it in its row where None.
            keys_N: seeds of dropout masks; None leaves dropout out.
        """
        rows, width = shape
        mixed = self.attention_in(self.attention_norm(x_NE)).view(rows, width, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_R1TT, is_causal=mask_R1TT is None
        )
        added = self.attention_out(seen.transpose(1, 2).reshape(len(x_NE), -1))
        if keys_N is not None:
            added = self.attention_dropout(added, keys_N)
        x_NE = x_NE + added
        added = self.feed_forward_out(F.gelu(self.feed_forward_in(self.feed_forward_norm(x_NE))))
        if keys_N is not None:
            added = self.feed_forward_dropout(added, keys_N)
        return x_NE + added

"""The two towers: embedding tables and one multi-layer perceptron a side; output of length 1 by default.

Tables are kept apart from the dense part (``Towers``): its gradients are summed over ranks as one buffer,
while tables are updated by row.

Shapes: B rows of a batch, L ids of a bag, D embedding_dim, E width of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from twotower.config import ModelConfig, TowerConfig
from twotower.features.base import Side
from twotower.features.ids import ITEM_IDS as ITEM_IDS
from twotower.model.batch import Bag, FeatureBatch, Sequences
from twotower.model.dropout import RowDropout
from twotower.model.encoders import make_encoder
from twotower.model.norm import GlobalBatchNorm
from twotower.model.unknown_items import UnknownItems
from twotower.schema import FeatureSchema, histories_among, residual_feature

Lookup = Callable[[str, Bag], torch.Tensor]
"""Turns (table name, bag) into pooled embeddings [B, E]."""

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
}


class Tower(nn.Module):
    """Multi-layer perceptron from concatenated features [B, in_dim] to embeddings [B, D]."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        config: TowerConfig,
        residual_columns: slice | None,
        normalize: bool,
        bias: Literal["none", "learned", "one"] = "none",
        encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Build the layers.

        Args:
            in_dim: width of the concatenated features.
            out_dim: D.
            config: sizes and kinds.
            residual_columns: where the embedding that ``residual: id`` adds is in the input, D wide; None
                where there is none.
            normalize: scale the output to length 1.
            bias: what the last coordinate is: one as the others, one that is never scaled, or 1.
            encoders: of the features that are sequences, by name; ``TwoTower.inputs`` calls them.
        """
        super().__init__()
        norms = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": GlobalBatchNorm}
        self.input_dropout = RowDropout(config.input_dropout, stream=0)
        self.layers = nn.ModuleList()
        width = in_dim
        for stream, size in enumerate(config.hidden, start=1):
            self.layers += [
                nn.Linear(width, size),
                norms[config.norm](size),
                _ACTIVATIONS[config.activation](),
                RowDropout(config.dropout, stream),
            ]
            width = size
        self.output = nn.Linear(width, out_dim)
        self.normalize = normalize
        self.bias = bias
        self.residual_columns = residual_columns if config.residual in ("auto", "id") else None
        if config.residual == "linear":
            self.skip = nn.Linear(in_dim, out_dim, bias=False)
        if self.residual_columns is not None:
            self.skip_scale = nn.Parameter(torch.ones(()))
        # A feature may have a name that a module's attribute has.
        self.encoders = nn.ModuleDict({f"of_{name}": module for name, module in (encoders or {}).items()})

    def forward(
        self, x: torch.Tensor, row_keys: torch.Tensor | None = None, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return [B, D] float32, L2-normalised where ``normalize`` is set, but for a ``bias``.

        Args:
            x: [B, in_dim] float32.
            row_keys: [B] int64, the seeds of each row's dropout masks; None leaves dropout out.
            valid: [B] bool, false at padding, which takes no part in batch statistics; None means all.
        """
        # A call of a module that does nothing costs a single query as much as one that does something.
        if row_keys is not None:
            x = self.input_dropout(x, row_keys)
        h = x
        for layer in self.layers:
            if isinstance(layer, RowDropout):
                if row_keys is not None:
                    h = layer(h, row_keys)
            elif isinstance(layer, nn.Identity):
                continue
            elif isinstance(layer, GlobalBatchNorm):
                h = layer(h, valid)
            else:
                h = layer(h)
        out = self.output(h)
        if self.residual_columns is not None:
            out = out + self.skip_scale * x[:, self.residual_columns]
        elif hasattr(self, "skip"):
            out = out + self.skip(x)
        if self.bias == "none":
            return F.normalize(out, dim=-1) if self.normalize else out
        nearness = F.normalize(out[:, :-1], dim=-1) if self.normalize else out[:, :-1]
        last = out[:, -1:] if self.bias == "learned" else torch.ones_like(out[:, -1:])
        return torch.cat([nearness, last], dim=-1)


class Towers(nn.Module):
    """Both towers: the part of a model whose gradients are dense."""

    def __init__(self, query: Tower, item: Tower) -> None:
        """Keep the two towers."""
        super().__init__()
        self.query = query
        self.item = item


class TwoTower(nn.Module):
    """The whole model: tables, towers and temperature."""

    def __init__(
        self, schema: FeatureSchema, config: ModelConfig, temperature: float, seed: int | None
    ) -> None:
        """Build a freshly initialised model.

        Args:
            schema: fitted features.
            config: sizes.
            temperature: initial temperature.
            seed: of the initial weights; the same seed gives the same model. None leaves the tables as memory
                happens to be, for weights that are to be loaded.
        """
        super().__init__()
        self.schema = schema
        self.embedding_dim = config.embedding_dim
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            self.tables = nn.ParameterDict()
            for name, (rows, width) in table_sizes(schema).items():
                # In place and in its own type: a table may be most of the machine's memory.
                table = torch.empty(rows, width, dtype=getattr(torch, config.table_dtype))
                self.tables[name] = nn.Parameter(
                    table if seed is None else table.normal_(std=config.init_std)
                )
            self.towers = Towers(
                _tower(schema, "query", config.query_tower, config),
                _tower(schema, "item", config.item_tower, config),
            )
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())
        self.unknown_items = _unknown_items(schema)

    def inputs(self, side: Side, batch: FeatureBatch, lookup: Lookup | None = None) -> torch.Tensor:
        """Return a side's concatenated features [B, in_dim] float32.

        Args:
            side: whose features.
            batch: the features, by name.
            lookup: how bags become embeddings; straight from the tables when not given.
        """
        lookup = lookup or self.lookup
        parts = []
        for feature in self.schema.features(side):
            spec = feature.spec
            name, value = spec.name, batch[spec.name]
            if isinstance(value, Sequences):
                bag = value.items
                items = bag.weights.new_zeros(0, self.tables[spec.table_name(side)].shape[1])
                if len(bag.ids):
                    items = lookup(spec.table_name(side), bag)
                parts.append(self.towers.query.encoders[f"of_{name}"](items, value))
            else:
                parts.append(lookup(spec.table_name(side), value) if isinstance(value, Bag) else value)
        return torch.cat(parts, dim=1)

    def encode_queries(self, batch: FeatureBatch) -> torch.Tensor:
        """Return query embeddings [B, D] float32, without dropout or gradient; see ``Tower.forward``."""
        with torch.inference_mode():
            return self.towers.query(self.inputs("query", batch))

    def encode_items(self, batch: FeatureBatch) -> torch.Tensor:
        """Return candidate embeddings [B, D] float32, without dropout or gradient; see ``Tower.forward``.

        Items that were not trained are encoded by their features, and the unknown id.
        """
        with torch.inference_mode():
            ids, known = self.schema.item_id, dict(batch)
            if ids is not None and isinstance(bag := known[ids.name], Bag):
                known[ids.name] = self.unknown_items.known(bag)
            return self.towers.item(self.inputs("item", known))

    def item_features(self, batch: FeatureBatch) -> torch.Tensor:
        """Return what the item tower reads of items beside their ids, [B, X] float32, without gradient."""
        with torch.inference_mode():
            x = self.inputs("item", batch)
            kept = [
                torch.full((f.spec.width({}),), f.spec is not self.schema.item_id) for f in self.schema.item
            ]
            return x[:, torch.cat(kept).to(x.device)]

    def batch_norms(self) -> Iterator[GlobalBatchNorm]:
        """Yield the layers whose statistics training sums over ranks."""
        return (module for module in self.modules() if isinstance(module, GlobalBatchNorm))

    def lookup(self, name: str, bag: Bag) -> torch.Tensor:
        """Return pooled embeddings of a table, [B, E] float32."""
        table, ids = self.tables[name], bag.ids.clamp(min=0)
        if bag.extra is None or not len(bag.extra):
            return pool(table, ids, bag.weights)
        own = ids < len(table)
        rows = pool(table, torch.where(own, ids, 0), bag.weights * own)
        return rows + pool(bag.extra, torch.where(own, 0, ids - len(table)), bag.weights * ~own)


def pool(table: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return weighted sums of table rows, [B, E] float32.

    Args:
        table: [R, E], of any floating type.
        ids: [B, L] int64, all in the table; padding has weight 0.
        weights: [B, L] float32.
    """
    if table.dtype != torch.float32:
        # Only the rows that are read become float32.
        distinct, ids = torch.unique(ids, return_inverse=True)
        table = table.index_select(0, distinct).float()
    if ids.shape[1] == 1:
        return F.embedding(ids[:, 0], table) * weights
    return F.embedding_bag(ids, table, per_sample_weights=weights, mode="sum")


def table_sizes(schema: FeatureSchema) -> dict[str, tuple[int, int]]:
    """Return (rows, width) of every embedding table; row 0 of those of ids is the unknown id."""
    sizes: dict[str, tuple[int, int]] = {}
    sides: tuple[Side, ...] = ("item", "query")
    for side in sides:
        for feature in schema.features(side):
            rows = feature.spec.table_rows(side, feature, schema)
            if rows is not None:
                sizes[feature.spec.table_name(side)] = (rows, feature.spec.width({}))
    return sizes


def _unknown_items(schema: FeatureSchema) -> UnknownItems:
    """Return what is read of items that training did not know; nothing where they are ids alone."""
    ids = schema.item_id
    width = sum(f.spec.width({}) for f in schema.item if f.spec is not ids)
    if not width:
        return UnknownItems(0, {}, 0)
    sizes = table_sizes(schema)
    read = [spec.table_name("query") for spec in schema.histories]
    own_rows = ids is not None and ids.buckets is None
    return UnknownItems(width, {name: sizes[name][1] for name in read}, sizes[ITEM_IDS][0] if own_rows else 0)


def _tower(schema: FeatureSchema, side: Side, tower: TowerConfig, model: ModelConfig) -> Tower:
    specs = [f.spec for f in schema.features(side)]
    items = {f.spec.name: f for f in schema.item}
    added = residual_feature(specs)
    width = 0
    columns = None
    for spec in specs:
        start = width
        width += spec.width(items)
        if added is not None and spec == added and added.dim == model.embedding_dim:
            columns = slice(start, width)
    encoders = {s.name: make_encoder(s, model.init_std) for s in histories_among(specs) if s.encoded}
    bias: Literal["none", "learned", "one"] = "none"
    if model.item_bias:
        bias = "learned" if side == "item" else "one"
    return Tower(width, model.embedding_dim, tower, columns, model.normalize, bias, encoders)

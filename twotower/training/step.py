"""One step's loss and gradients: towers in chunks, candidates of all ranks, one reduction.

A rank's loss is the weighted sum over its queries over the weight of the global batch, so the global loss,
and every gradient, is the sum over ranks.

With ``train.tower_chunk_size`` a tower runs twice over its rows, in chunks (GradCache): first without a graph
for all embeddings, which the loss gives gradients; then chunk by chunk with a graph, fed these gradients.
Dropout masks are a function of the row, so both passes see the same.

Source: Gao, Zhang, Han, Callan: Scaling deep contrastive learning batch size under memory limited setup
    (RepL4NLP 2021).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from twotower.config import Config
from twotower.model.batch import Bag, FeatureBatch, bag_of
from twotower.model.encoders import Block
from twotower.model.losses import GlobalBatch, Known, choose_loss, in_batch_softmax
from twotower.model.towers import Side as SideName
from twotower.model.towers import TwoTower
from twotower.training.assembly import Batch, Side
from twotower.training.batches import Share
from twotower.training.collectives import (
    World,
    gather,
    gather_ragged,
    gather_with_gradient,
    reduce_gradients,
    sum_with_gradient,
)
from twotower.training.negatives import CandidateMemory
from twotower.training.tables import RowGradient, TouchedRows


@dataclass(frozen=True)
class Gradients:
    """What ``Step.gradients`` leaves beside the gradients in ``.grad``."""

    loss: float
    """Weighted mean loss of the global batch."""
    tables: dict[str, RowGradient]
    """Gradients of touched rows by table."""
    flag: bool
    """Whether any rank passed a flag."""


class Step:
    """Computes gradients of a model for one batch after another."""

    def __init__(self, model: TwoTower, config: Config, world: World, memory: CandidateMemory) -> None:
        """Keep the model; its towers are compiled where the configuration says so."""
        self.parameters = [*model.towers.parameters(), model.log_temperature]
        """In the order of the flat buffer that is reduced."""
        self._model = model
        self._world = world
        self._memory = memory
        self._loss = config.train.loss
        self._loss_of = choose_loss(config.train.loss)
        self._chunk = config.train.tower_chunk_size
        self._tables = dict(model.tables.items())
        towers: dict[SideName, torch.nn.Module] = {"query": model.towers.query, "item": model.towers.item}
        self._towers = {s: torch.compile(t) if config.train.compile else t for s, t in towers.items()}
        if config.train.compile:
            for module in model.towers.query.encoders.modules():
                if isinstance(module, Block):
                    module.compile()
        self._low_precision = low_precision(config, world.device)
        for norm in model.batch_norms():
            norm.all_reduce = lambda x: sum_with_gradient(x, world)

    def gradients(self, batch: Batch, flag: bool = False) -> Gradients:
        """Compute the gradients of the global batch into ``.grad`` of towers and temperature.

        Collective: all ranks, each with its share of the same global batch.

        Args:
            batch: of this rank.
            flag: handed to all ranks, along with the loss.
        """
        world, share = self._world, batch.share
        for parameter in self.parameters:
            parameter.grad = None
        sides: dict[SideName, Side] = {
            "query": _without_padding(batch.queries).to(world.device),
            "item": _without_padding(batch.items).to(world.device),
        }
        touched = TouchedRows(self._tables, [bag for s in sides for bag in self._bags(s, sides[s])])
        query = _Pass(self, "query", sides["query"], touched)
        item = _Pass(self, "item", sides["item"], touched)

        weight = _on(world.device, share.loss_weights(world.rank))
        loss = self._in_batch(batch, query.out, item.out, weight)
        if self._loss.symmetric:
            loss = 0.5 * (loss + self._item_to_query(share, query.out, item.out, weight))
        loss.backward()
        for tower in (query, item):
            tower.backward()
        scalars = torch.tensor([0.0, float(flag)], device=world.device)
        scalars[0] = loss.detach()
        total, flags = reduce_gradients(self.parameters, scalars, world).tolist()
        return Gradients(total, touched.gradients(world), flags > 0)

    def _in_batch(
        self, batch: Batch, queries: torch.Tensor, items: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Return this rank's part of the loss of queries finding their items."""
        world, device = self._world, self._world.device
        b = len(queries)
        shared = gather_with_gradient(items[: batch.num_shared], world)
        candidate_rows = batch.candidate_rows.to(device)
        candidates = shared
        if len(candidate_rows) > len(shared):
            candidates = torch.cat([shared, self._memory.vectors])
        own = own_log_q = None
        width = batch.own_log_q.shape[1]
        if width:
            empty = items.new_zeros(b * width, items.shape[1])
            place = batch.own_place.to(device)
            own = empty.index_copy(0, place, items[batch.num_shared :]).view(b, width, -1)
            own_log_q = batch.own_log_q.to(device)
        known = None
        if batch.left_out is not None:
            known = Known(batch.left_out[0].to(device), batch.left_out[1].to(device), candidate_rows)
        # On a rank its b positives come first, then its drawn candidates; ranks follow each other.
        positive = world.rank * batch.num_shared + torch.arange(b, device=device)
        loss = self._loss_of(
            queries,
            candidates,
            positive,
            self._model.log_temperature.exp(),
            batch.log_q.to(device),
            candidate_rows,
            weight,
            mask_accidental_hits=self._loss.mask_accidental_hits,
            known=known,
            own_QHD=own,
            own_log_q_QH=own_log_q,
            whole=lambda: self._whole(batch.share),
        )
        self._remember(batch, shared)
        return loss

    def _whole(self, share: Share) -> GlobalBatch:
        """Return what a loss may ask of the global batch."""
        world, device = self._world, self._world.device
        return GlobalBatch(
            _on(device, share.user_rows.ravel()),
            _on(device, np.concatenate([share.loss_weights(rank) for rank in range(world.size)])),
            world.rank * len(share.rows),
            lambda x: gather(x, world),
            share.examples.inputs.num_catalogue_items,
        )

    def _item_to_query(
        self, share: Share, queries: torch.Tensor, items: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Return this rank's part of the loss of items finding their queries among those of the batch."""
        world, device = self._world, self._world.device
        b = len(queries)
        counts = np.maximum(share.user_counts.ravel(), 1)
        known = None
        if self._loss.mask_known_positives:
            offsets, users = _owners(share, world)
            known = Known(offsets.to(device), users.to(device), _on(device, share.user_rows.ravel()))
        return in_batch_softmax(
            items[:b],
            gather_with_gradient(queries, world),
            world.rank * b + torch.arange(b, device=device),
            self._model.log_temperature.exp(),
            _on(device, np.log(counts).astype(np.float32) * np.float32(self._loss.log_q)),
            _on(device, share.item_rows.ravel()),
            weight,
            mask_accidental_hits=self._loss.mask_accidental_hits,
            known=known,
        )

    def _remember(self, batch: Batch, shared: torch.Tensor) -> None:
        if len(self._memory.item_rows) == 0:
            return
        rows = torch.from_numpy(batch.share.item_rows.ravel())
        each = batch.num_shared
        positives = shared.detach().view(self._world.size, each, -1)[:, : len(batch.share.rows)]
        positives = positives.reshape(len(rows), -1)
        self._memory.push(positives[(rows >= 0).to(positives.device)], rows[rows >= 0])

    def _bags(self, side: SideName, rows: Side) -> list[tuple[str, Bag]]:
        schema = self._model.schema
        features = schema.query if side == "query" else schema.item
        named = [(f.spec.table_name(side), bag_of(rows.features[f.spec.name])) for f in features]
        return [(name, bag) for name, bag in named if bag is not None]

    def embed(self, side: SideName, rows: Side, touched: TouchedRows) -> torch.Tensor:
        """Return the embeddings [rows, D] float32 of a side's rows, with a graph where gradients are on."""
        device = self._world.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._low_precision):
            x = self._model.inputs(side, rows.features, touched.lookup)
            out: torch.Tensor = self._towers[side](x, rows.keys, rows.valid)
        return out.float()

    def chunks(self, rows: int) -> list[slice]:
        """Return the chunks of a side's rows; one where all of them go at once."""
        each = self._chunk or rows
        return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


class _Pass:
    """A side's rows on their way through the tower: embeddings now, gradients after the loss."""

    def __init__(self, step: Step, side: SideName, rows: Side, touched: TouchedRows) -> None:
        self._embed = lambda chunk: step.embed(side, rows.part(chunk), touched)
        self._chunks = step.chunks(len(rows))
        self._graph: torch.Tensor | None = None
        if len(self._chunks) == 1:
            self._graph = self._embed(self._chunks[0])
            embeddings = self._graph
        else:
            with torch.no_grad():
                embeddings = torch.cat([self._embed(chunk) for chunk in self._chunks])
        self.out = embeddings.detach().requires_grad_()
        """Leaf of the loss, [rows, D]."""

    def backward(self) -> None:
        """Carry the loss's gradient of the embeddings on to the parameters and touched rows."""
        assert self.out.grad is not None
        for chunk in self._chunks:
            graph = self._embed(chunk) if self._graph is None else self._graph
            graph.backward(self.out.grad[chunk])


def _without_padding(rows: Side) -> Side:
    """Return rows of which padding looks up nothing.

    A row of a table that is read is updated, by its moments and by decay, even where its gradient is zero:
    which rows padding reads must not depend on the number of workers.
    """
    if bool(rows.valid.all()):
        return rows
    gone = ~rows.valid[:, None]
    features: FeatureBatch = {
        name: Bag(value.ids.masked_fill(gone, -1), value.weights.masked_fill(gone, 0))
        if isinstance(value, Bag)
        else value
        for name, value in rows.features.items()
    }
    return replace(rows, features=features)


def low_precision(config: Config, device: torch.device) -> bool:
    """Return whether the towers compute in bfloat16."""
    if config.train.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.train.precision == "bfloat16"


def _owners(share: Share, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each local positive the batch's users who have had it: offsets [b + 1] and user rows."""
    offsets, items = share.examples.known_positives(share.rows, share.item_rows.ravel())
    users = np.repeat(share.user_rows[world.rank], np.diff(offsets))
    pairs = np.unique(np.stack([items, users], axis=1), axis=0)
    everyone = gather_ragged(torch.from_numpy(pairs).to(world.device), world).cpu().numpy()
    everyone = np.unique(everyone, axis=0)
    mine = share.item_rows[world.rank]
    begin = np.searchsorted(everyone[:, 0], mine, side="left")
    lengths = np.searchsorted(everyone[:, 0], mine, side="right") - begin
    ends = np.cumsum(lengths)
    places = np.arange(ends[-1]) + np.repeat(begin - (ends - lengths), lengths)
    return (
        torch.from_numpy(np.concatenate([[0], ends])),
        torch.from_numpy(everyone[places, 1]),
    )


def _on(device: torch.device, values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(device)

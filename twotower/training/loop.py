"""The training loop of one worker: the same code alone and among many.

The global batch of a step is a slice of the epoch's permutation, which every rank knows; a rank takes an
equal share of its rows. Candidates are all items of the global batch. An uneven last batch is padded to
equal shares and masked; the loss is the global sum over the global count.

Shapes: B global batch, b = B / W rows of a rank, W world size, D embedding_dim, N catalogue items.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parallel import DistributedDataParallel

from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import TrainingError
from twotower.model.checkpoint import weights_of
from twotower.model.dropout import row_keys, uniform
from twotower.model.features import Bag, FeatureBatch, to_device
from twotower.model.losses import in_batch_softmax
from twotower.model.towers import Side, TwoTower, table_name
from twotower.schema import UNKNOWN_ROW, IdFeature
from twotower.training.collectives import World, gather_with_gradient, sum_over_ranks
from twotower.training.examples import Examples, Fit, held_out
from twotower.training.tables import RowGradient, TableOptimizer, TouchedRows
from twotower.training.validation import validate

_UNKNOWN_STREAM = 1 << 20


@dataclass(frozen=True)
class EpochReport:
    """What an epoch came to."""

    epoch: int
    """From 1."""
    loss: float
    """Mean loss of its steps, over all workers."""
    temperature: float
    """Temperature at its end."""
    seconds: float
    """Seconds of its steps, on this worker."""
    validation_recall: float | None
    """Mean recall@k of the validation users; none where everything is fitted."""
    validation_ndcg: float | None
    """Mean ndcg@k of the validation users."""


class Trainer:
    """Trains one model as one rank of a world."""

    def __init__(self, config: Config, dataset: Dataset, world: World, fit: Fit) -> None:
        """Load the data and build the model and the optimisers; all ranks build the same.

        Raises:
            TrainingError: the global batch is larger than the number of examples.
        """
        self.config = config
        self.world = world
        self.fit = fit
        self.examples = Examples(dataset, fit)
        self._batch = config.train.global_batch_size
        if self._batch > len(self.examples):
            raise TrainingError(
                f"train.global_batch_size ({self._batch}) is above the {len(self.examples)} training "
                f"interactions; use at most {len(self.examples) // world.size * world.size}"
            )
        loss = config.train.loss
        self.model = TwoTower(dataset.schema, config.model, loss.temperature, config.seed).to(world.device)
        self._towers: torch.nn.Module = self.model.towers
        if world.size > 1:
            # Tables and temperature stay outside: DDP would reduce dense table gradients, and leaves
            # gradients unreduced when a parameter of the loss is wrapped with the towers.
            self._towers = DistributedDataParallel(
                self.model.towers, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # Loading a checkpoint copies into these tensors, so they stay the model's own.
        self._table_weights = dict(self.model.tables.items())
        settings = config.train.optimizer
        self.dense_parameters = list(self.model.towers.parameters())
        self._dense = torch.optim.AdamW(
            [
                {"params": self.dense_parameters, "weight_decay": settings.weight_decay},
                {"params": [self.model.log_temperature], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
        )
        self._tables = TableOptimizer(self._table_weights, settings.table_kind)
        self.table_gradients: dict[str, RowGradient] = {}
        probability = np.maximum(self.examples.counts, 1) / len(self.examples)
        self._log_q = torch.from_numpy(np.log(probability).astype(np.float32) * loss.log_q)
        self.steps_per_epoch = math.ceil(len(self.examples) / self._batch)
        self._held_out = (
            held_out(dataset, "validation", config.train.validation.max_users, config.seed)
            if fit == "train"
            else None
        )
        self.epoch = 0
        self.history: list[EpochReport] = []
        self.best_epoch = 0
        self.best_weights: dict[str, torch.Tensor] = {}

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the epoch's permutation of all examples, the same on every rank, [n] int64."""
        return np.random.default_rng([self.config.seed, 2, epoch]).permutation(len(self.examples))

    def gradients(self, order: npt.NDArray[np.int64], epoch: int, step: int) -> torch.Tensor:
        """Compute a step's gradients, the mean over the global batch, and return its global loss (scalar).

        Leaves them in ``.grad`` of the towers and the temperature, and in ``table_gradients``.
        Collective: all ranks, with the same order, epoch and step.
        """
        world = self.world
        rows = order[step * self._batch : (step + 1) * self._batch]
        share = -(-len(rows) // world.size)
        # Padding repeats the first row; it is masked as a query and as a candidate.
        padded = np.concatenate([rows, np.repeat(rows[:1], share * world.size - len(rows))])
        valid = torch.arange(len(padded)) < len(rows)
        mine = slice(world.rank * share, (world.rank + 1) * share)
        all_items = self.examples.item_rows(padded)

        queries = self.examples.queries(padded[mine])
        items = self.examples.items(all_items[mine])
        global_step = epoch * self.steps_per_epoch + step
        global_rows = torch.arange(mine.start, mine.stop)
        keys = {
            side: row_keys(self.config.seed, global_step, global_rows, stream)
            for stream, side in enumerate(("query", "item"))
        }
        self._forget_some_ids("query", queries, keys["query"])
        self._forget_some_ids("item", items, keys["item"])
        queries, items = to_device(queries, world.device), to_device(items, world.device)

        touched = TouchedRows(self._table_weights, self._bags("query", queries) + self._bags("item", items))
        device = world.device
        q, c = self._towers(
            self.model.inputs("query", queries, touched.lookup),
            self.model.inputs("item", items, touched.lookup),
            keys["query"].to(device),
            keys["item"].to(device),
        )
        ids = torch.from_numpy(all_items)
        known = None
        if self.config.train.loss.mask_known_positives:
            known = torch.from_numpy(self.examples.known_positives(padded[mine], all_items)).to(device)
        losses = in_batch_softmax(
            q,
            gather_with_gradient(c, world),
            global_rows.to(device),
            self.model.log_temperature.exp(),
            self._log_q[ids].to(device),
            ids.to(device),
            valid.to(device),
            self.config.train.loss.mask_accidental_hits,
            known,
        )
        local = torch.where(valid[mine].to(device), losses, 0.0).sum() / len(rows)
        self._dense.zero_grad(set_to_none=True)
        # DDP and the reductions below take the mean over ranks; the global loss is the sum.
        (local * world.size).backward()
        temperature = self.model.log_temperature
        assert temperature.grad is not None
        sum_over_ranks(temperature.grad, world).div_(world.size)
        self.table_gradients = touched.gradients(world)
        return sum_over_ranks(local.detach(), world)

    def update(self, global_step: int) -> None:
        """Apply the gradients of the last ``gradients`` call."""
        settings = self.config.train.optimizer
        scale = self._schedule(global_step)
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.dense_parameters, settings.max_grad_norm)
        if not self.config.train.loss.learn_temperature:
            self.model.log_temperature.grad = None
        for group in self._dense.param_groups:
            group["lr"] = settings.learning_rate * scale
        self._dense.step()
        self._tables.step(self.table_gradients, settings.table_learning_rate * scale)
        with torch.no_grad():
            self.model.log_temperature.clamp_(min=math.log(self.config.train.loss.min_temperature))

    def run_epoch(self, on_step: Callable[[int, float], None] | None = None) -> EpochReport:
        """Train one epoch and validate.

        Args:
            on_step: called after each step with (examples of this epoch so far, loss); a loss is
                only read, and so only costs time, where this is given.

        Raises:
            TrainingError: the mean loss is not finite.
        """
        self.model.train()
        order = self.order(self.epoch)
        total = torch.zeros((), device=self.world.device)
        started = time.perf_counter()
        for step in range(self.steps_per_epoch):
            loss = self.gradients(order, self.epoch, step)
            self.update(self.epoch * self.steps_per_epoch + step)
            total += loss
            if on_step is not None:
                on_step(min((step + 1) * self._batch, len(order)), float(loss))
        seconds = time.perf_counter() - started
        loss_mean = float(total) / self.steps_per_epoch
        if not math.isfinite(loss_mean):
            raise TrainingError(
                f"the loss of epoch {self.epoch + 1} is {loss_mean}; lower train.optimizer.learning_rate "
                f"({self.config.train.optimizer.learning_rate}) or raise train.loss.min_temperature"
            )
        self.epoch += 1
        self.model.eval()
        recall = ndcg = None
        if self._held_out is not None:
            k = self.config.train.validation.k
            metrics = validate(self.model, self.examples, self._held_out, self.world, k)
            recall, ndcg = metrics[f"recall@{k}"], metrics[f"ndcg@{k}"]
        report = EpochReport(
            self.epoch, loss_mean, float(self.model.log_temperature.detach().exp()), seconds, recall, ndcg
        )
        self.history.append(report)
        if self._is_best(report):
            self.best_epoch = self.epoch
            self.best_weights = {name: t.clone() for name, t in weights_of(self.model).items()}
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs but the weights, as tensors and plain values."""
        return {
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "history": [asdict(r) for r in self.history],
            "dense": self._dense.state_dict(),
            "tables": self._tables.state_dict(),
        }

    def load_state_dict(
        self, state: dict[str, Any], weights: dict[str, torch.Tensor], best: dict[str, torch.Tensor]
    ) -> None:
        """Restore ``state_dict``, the weights and the best weights."""
        self.model.load_state_dict(weights)
        self._dense.load_state_dict(state["dense"])
        self._tables.load_state_dict(state["tables"])
        self.epoch = state["epoch"]
        self.best_epoch = state["best_epoch"]
        self.history = [EpochReport(**r) for r in state["history"]]
        self.best_weights = best

    def _is_best(self, report: EpochReport) -> bool:
        if self._held_out is None or self.best_epoch == 0:
            return True
        name = f"validation_{self.config.train.validation.metric}"
        return bool(getattr(report, name) > getattr(self.history[self.best_epoch - 1], name))

    def _schedule(self, global_step: int) -> float:
        """Return the share of the peak learning rate at a step (from 0) of the configured run."""
        settings = self.config.train.optimizer
        total = self.config.train.epochs * self.steps_per_epoch
        warmup = round(settings.warmup_share * total)
        if global_step < warmup:
            return (global_step + 1) / warmup
        done = (global_step - warmup) / max(total - warmup, 1)
        if settings.schedule == "linear":
            return 1 - done
        if settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0

    def _forget_some_ids(self, side: Side, batch: FeatureBatch, keys: torch.Tensor) -> None:
        """Replace a share of the ids of the side's id feature by the unknown id, to train its row too."""
        features = self.examples.schema.query if side == "query" else self.examples.schema.item
        for feature in features:
            spec, value = feature.spec, batch[feature.spec.name]
            if isinstance(spec, IdFeature) and isinstance(value, Bag) and spec.unknown_rate > 0:
                forgotten = uniform(keys, 1, _UNKNOWN_STREAM) < spec.unknown_rate
                batch[spec.name] = Bag(torch.where(forgotten, UNKNOWN_ROW, value.ids), value.weights)

    def _bags(self, side: Side, batch: FeatureBatch) -> list[tuple[str, Bag]]:
        features = self.examples.schema.query if side == "query" else self.examples.schema.item
        values = [(table_name(side, f), batch[f.spec.name]) for f in features]
        return [(name, value) for name, value in values if isinstance(value, Bag)]

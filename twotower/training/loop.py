"""The training loop of one worker: the same code alone and among many.

Everything random is a function of the seed and of a step's or row's number, so a restored run goes on as if
it had not stopped: there is no generator whose state would have to be kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.data.interactions import Interactions
from twotower.data.knowledge import Rules
from twotower.errors import TrainingError
from twotower.model.checkpoint import weights_of
from twotower.model.towers import TwoTower
from twotower.progress import say
from twotower.training.ahead import made_ahead
from twotower.training.assembly import Assembler, Batch
from twotower.training.batches import MemorySource, Share
from twotower.training.checks import check_sizes, require_same_model
from twotower.training.collectives import World
from twotower.training.examples import Examples, Fit, TowerInputs
from twotower.training.mining import mine
from twotower.training.negatives import CandidateMemory, CandidateSampler
from twotower.training.optim import Optimizers, schedule
from twotower.training.step import Step
from twotower.training.threads import limited_threads
from twotower.training.unknown_items import UnknownItemsFit
from twotower.training.validation import validate, validation_queries
from twotower.training.weights import Factors


class Source(Protocol):
    """Where global batches come from."""

    steps_per_epoch: int
    rows_per_epoch: int

    def shares(self, epoch: int, first_step: int = 0) -> Iterator[Share]:
        """Yield this rank's shares of an epoch, as many on every rank."""

    def item_counts(self) -> npt.NDArray[np.int64]:
        """Return how often each catalogue item is a positive in an epoch."""

    def blocks(self) -> Iterable[Interactions]:
        """Yield all interactions, of every split, in blocks that part no user."""

    @property
    def order_key(self) -> str:
        """What an epoch's order depends on beside the seed; where it changes the epoch begins anew."""


@dataclass(frozen=True)
class EpochReport:
    """What an epoch came to."""

    epoch: int
    """From 1."""
    loss: float
    """Mean over its steps of their losses, over all workers; examples weigh in these as in training."""
    temperature: float
    """Temperature at its end."""
    seconds: float
    """Seconds of its steps, on this worker."""
    validation_recall: float | None
    """Mean recall@k of the validation users; none where everything is fitted."""
    validation_ndcg: float | None
    """Mean ndcg@k of the validation users."""


@dataclass(frozen=True)
class StepReport:
    """What a step came to; the same on all ranks."""

    step: int
    """Optimiser steps so far, this one included."""
    epoch: int
    """From 1."""
    done: int
    """Examples of the epoch so far."""
    loss: float
    temperature: float
    learning_rate: float
    gradient_norm: float
    stopping: bool
    """A rank was asked to stop; all of them know of it in the same step."""


class Trainer:
    """Trains one model as one rank of a world."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        world: World,
        fit: Fit,
        make_source: Callable[[TowerInputs], Source] | None = None,
    ) -> None:
        """Load the data and build the model and the optimisers; all ranks build the same.

        Args:
            config: the configuration.
            dataset: prepared.
            world: this process's place.
            fit: the split that is trained on.
            make_source: makes the source of batches; all interactions in memory when not given.

        Raises:
            TrainingError: the global batch, or the window that is mined, is larger than what there is.
            DataError: no user could be validated.
        """
        self.config = config
        self.world = world
        self.fit = fit
        self._dataset = dataset
        self.inputs = TowerInputs(dataset)
        self.source: Source
        if make_source is None:
            self.source = memory_source(config, dataset, self.inputs, world, fit)
        else:
            self.source = make_source(self.inputs)
        check_sizes(config, dataset, self.source.rows_per_epoch)
        self.model = TwoTower(dataset.schema, config.model, config.train.loss.temperature, config.seed)
        self.model.to(world.device)
        self.optimizers = Optimizers(self.model, config)
        negatives = config.train.negatives
        self._memory = CandidateMemory(negatives.memory, config.model.embedding_dim, world.device)
        sampler = CandidateSampler(self.source.item_counts(), negatives, config.seed)
        self.assemble = Assembler(config, world, sampler, self._memory)
        self.compute = Step(self.model, config, world, self._memory)
        counts = self.source.item_counts()
        self._fit_unknown = UnknownItemsFit(dataset.schema, counts, sampler.unchosen_row)
        self._validation = None
        if fit == "train":
            rules = Rules.of(dataset, config.evaluation.repeats)
            most = config.train.validation.max_users
            self._validation = validation_queries(self.source.blocks, self.inputs, rules, most, config.seed)
        self.epoch = 0
        """Finished epochs."""
        self.step = 0
        """Finished steps of all epochs."""
        self.history: list[EpochReport] = []
        self.best_epoch = 0
        self.best_weights: dict[str, torch.Tensor] = {}
        # Of the epoch at work: steps, examples, the sum of losses, seconds.
        self._epoch_steps = self._epoch_done = 0
        self._epoch_loss = self._epoch_seconds = 0.0

    @property
    def finished(self) -> bool:
        """Whether training ends here, before its last epoch: validation has not improved for long enough."""
        patience = self.config.train.early_stopping.patience
        return patience is not None and self.best_epoch > 0 and self.epoch - self.best_epoch >= patience

    def run_epoch(
        self,
        on_step: Callable[[StepReport], None] | None = None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> EpochReport:
        """Train an epoch, or what is left of it, and validate.

        It takes ``train.threads_per_worker`` CPU threads; the caller's own number is set again behind it.

        Args:
            on_step: called on every rank after each step.
            stop_asked: asked before each step; the answer of any rank reaches all in their step report.

        Raises:
            TrainingError: the loss or a gradient is not finite; nothing was updated with it.
        """
        with limited_threads(self.config.train.threads_per_worker):
            return self._run_epoch(on_step, stop_asked)

    def _run_epoch(
        self, on_step: Callable[[StepReport], None] | None, stop_asked: Callable[[], bool]
    ) -> EpochReport:
        self.model.train()
        while self._epoch_steps < self.source.steps_per_epoch:
            first = self._epoch_steps
            self._mine_if_due()
            every = self.config.train.negatives.mined.every_steps
            count = self.source.steps_per_epoch - first
            if self.assemble.mined is not None and every is not None:
                count = min(count, every - first % every)
            for batch in self._batches(first, count):
                report = self._train_on(batch, stop_asked())
                if on_step is not None:
                    on_step(report)
        return self._end_epoch()

    def _batches(self, first_step: int, count: int) -> Iterator[Batch]:
        """Yield batches of the epoch at work; made ahead by a thread where a GPU does the steps."""
        shares = self.source.shares(self.epoch, first_step)
        before = self.step

        def made() -> Iterator[Batch]:
            for number in range(count):
                yield self.assemble(next(shares), before + number)

        # The memory's items are those of the step before, which a thread could not know ahead.
        if self.world.device.type == "cuda" and self.config.train.negatives.memory == 0:
            return made_ahead((batch.pinned() for batch in made()), depth=2)
        return made()

    @property
    def epoch_done(self) -> int:
        """Examples of the epoch at work so far."""
        return self._epoch_done

    def _train_on(self, batch: Batch, stop: bool) -> StepReport:
        started = time.perf_counter()
        gradients = self.compute.gradients(batch, stop)
        norm = self.optimizers.gradient_norm(gradients)
        total = self.config.train.epochs * self.source.steps_per_epoch
        scale = schedule(self.config, self.step, total)
        learning_rate = self.config.train.optimizer.learning_rate * scale
        if not (math.isfinite(gradients.loss) and math.isfinite(norm)):
            raise TrainingError(self._diverged(batch.share, gradients.loss, norm, learning_rate))
        self.optimizers.update(gradients, norm, scale, (self.step + 1) / total)
        self.step += 1
        self._epoch_steps += 1
        self._epoch_done += batch.share.size
        self._epoch_loss += gradients.loss
        self._epoch_seconds += time.perf_counter() - started
        return StepReport(
            self.step,
            self.epoch + 1,
            self._epoch_done,
            gradients.loss,
            self.temperature,
            learning_rate,
            norm,
            gradients.flag,
        )

    @property
    def temperature(self) -> float:
        """The temperature now."""
        return float(self.model.log_temperature.detach().exp())

    def _mine_if_due(self) -> None:
        mined = self.config.train.negatives.mined
        if not mined.per_query or self.epoch + 1 < mined.start_epoch:
            return
        at_start = self._epoch_steps == 0 and (self.epoch + 1 - mined.start_epoch) % mined.every_epochs == 0
        inside = mined.every_steps is not None and self._epoch_steps % mined.every_steps == 0
        if self.assemble.mined is None or at_start or (inside and self._epoch_steps > 0):
            assert isinstance(self.source, MemorySource)
            self.model.eval()
            self.assemble.mined = mine(
                self.model, self.source.examples, self.world, mined, self.config.seed, self.step
            )
            self.model.train()

    def _end_epoch(self) -> EpochReport:
        self.epoch += 1
        self.model.eval()
        self._fit_unknown(self.model, self.inputs, self.world)
        recall = ndcg = None
        if self._validation is not None:
            k = self.config.train.validation.k
            metrics = validate(self.model, self.inputs, self._validation, self.world, k)
            recall, ndcg = metrics[f"recall@{k}"], metrics[f"ndcg@{k}"]
        loss = self._epoch_loss / self._epoch_steps
        report = EpochReport(self.epoch, loss, self.temperature, self._epoch_seconds, recall, ndcg)
        self.history.append(report)
        if self._is_best(report):
            self.best_epoch = self.epoch
            self.best_weights = {name: t.clone() for name, t in weights_of(self.model).items()}
        self._reset_epoch()
        return report

    def _reset_epoch(self) -> None:
        self._epoch_steps = self._epoch_done = 0
        self._epoch_loss = self._epoch_seconds = 0.0

    def _is_best(self, report: EpochReport) -> bool:
        if self._validation is None or self.best_epoch == 0:
            return True
        name = f"validation_{self.config.train.validation.metric}"
        gain = getattr(report, name) - getattr(self.history[self.best_epoch - 1], name)
        return bool(gain > self.config.train.early_stopping.min_delta)

    def _diverged(self, share: Share, loss: float, norm: float, learning_rate: float) -> str:
        users, items = share.user_rows.ravel(), share.item_rows.ravel()
        there = np.flatnonzero(items >= 0)
        first = there[:5]
        # By row: sweeps and logs keep the message, where nobody looks for a user who is to be forgotten.
        pairs = zip(users[first].tolist(), self._dataset.item_ids.ids(items[first]), strict=True)
        some = ", ".join(f"({user}, {item})" for user, item in pairs)
        return (
            f"step {self.step + 1} of epoch {self.epoch + 1} has loss {loss} and gradient norm {norm} at "
            f"learning rate {learning_rate:.3g}; both must be finite. Its batch of {len(there)} pairs (user "
            f"row, item) begins with {some}. The last checkpoint before it is kept. Lower "
            f"train.optimizer.learning_rate ({self.config.train.optimizer.learning_rate}), set "
            "train.optimizer.max_grad_norm, or look for damaged numeric or vector features"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs but the weights, as tensors and plain values."""
        mined = self.assemble.mined
        return {
            "order": self.source.order_key,
            "epoch": self.epoch,
            "step": self.step,
            "epoch_steps": self._epoch_steps,
            "epoch_done": self._epoch_done,
            "epoch_loss": self._epoch_loss,
            "epoch_seconds": self._epoch_seconds,
            "best_epoch": self.best_epoch,
            "history": [asdict(r) for r in self.history],
            "optimizers": self.optimizers.state_dict(),
            "memory": self._memory.state_dict(),
            "mined": None if mined is None else torch.from_numpy(mined),
        }

    def load_state_dict(
        self, state: dict[str, Any], weights: dict[str, torch.Tensor], best: dict[str, torch.Tensor]
    ) -> None:
        """Restore ``state_dict``, the weights and the best weights.

        Raises:
            TrainingError: they are those of another model.
        """
        require_same_model(self.model, weights, "the checkpoint that this training would resume from")
        self.model.load_state_dict(weights)
        self.optimizers.load_state_dict(state["optimizers"])
        self._memory.load_state_dict(state["memory"])
        self.assemble.mined = None if state["mined"] is None else state["mined"].numpy()
        self.epoch = state["epoch"]
        self.step = state["step"]
        self._epoch_steps = state["epoch_steps"]
        self._epoch_done = state["epoch_done"]
        self._epoch_loss = state["epoch_loss"]
        self._epoch_seconds = state["epoch_seconds"]
        self.best_epoch = state["best_epoch"]
        self.history = [EpochReport(**r) for r in state["history"]]
        self.best_weights = best
        if self._epoch_steps and state["order"] != self.source.order_key:
            if self.world.rank == 0:
                say(
                    f"epoch {self.epoch + 1} begins anew after {self._epoch_steps} of its steps, made in "
                    f"the order of {state['order']}; now it is that of {self.source.order_key}"
                )
            self.step -= self._epoch_steps
            self._reset_epoch()


def memory_source(
    config: Config, dataset: Dataset, inputs: TowerInputs, world: World, fit: Fit
) -> MemorySource:
    """Return the source that holds all interactions in memory."""
    weighted = config.train.loss.weights == "interaction"
    factors = Factors.of(config.train.loss, dataset)
    examples = Examples.of(dataset, inputs, fit, config.train.negatives.explicit > 0, weighted, factors)
    size = config.train.batch_size(dataset.train_positives)
    return MemorySource(examples, dataset.interactions, size, world, config.seed)

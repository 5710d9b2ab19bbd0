"""The optimisers of a model: AdamW for towers and temperature, a row-wise one for tables, one schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from twotower.config import Config
from twotower.model.towers import TwoTower
from twotower.training.step import Gradients
from twotower.training.tables import TableOptimizer


class Optimizers:
    """Updates every parameter of a model from one step's gradients."""

    def __init__(self, model: TwoTower, config: Config) -> None:
        """Make fresh state."""
        self._settings = config.train.optimizer
        self._loss = config.train.loss
        self._temperature = model.log_temperature
        self._towers = list(model.towers.parameters())
        self._dense = torch.optim.AdamW(
            [
                {"params": self._towers, "weight_decay": self._settings.weight_decay},
                {"params": [self._temperature], "weight_decay": 0.0},
            ],
            lr=self._settings.learning_rate,
            fused=self._temperature.is_cuda,
        )
        self._tables = TableOptimizer(
            dict(model.tables.items()),
            self._settings.table_kind,
            config.seed,
            self._settings.table_weight_decay,
        )

    @torch.no_grad()
    def gradient_norm(self, gradients: Gradients) -> float:
        """Return the Euclidean norm of the gradient of all that is learned, table rows included."""
        learned = [*self._towers, self._temperature] if self._loss.learn_temperature else self._towers
        dense = [p.grad for p in learned if p.grad is not None]
        rows = [grad for _, grad in gradients.tables.values() if grad.numel()]
        return float(torch.stack(torch._foreach_norm([*dense, *rows])).norm())

    def update(self, gradients: Gradients, norm: float, scale: float, progress: float = 0.0) -> None:
        """Apply a step's gradients.

        Args:
            gradients: of the global batch; those of the dense part are in ``.grad``.
            norm: from ``gradient_norm``.
            scale: share of the peak learning rates.
            progress: share of all steps that are done with this one, for a temperature that has a schedule.
        """
        settings, loss = self._settings, self._loss
        shrink = 1.0
        if settings.max_grad_norm is not None and norm > settings.max_grad_norm:
            shrink = settings.max_grad_norm / norm
            for parameter in (*self._towers, self._temperature):
                if parameter.grad is not None:
                    parameter.grad.mul_(shrink)
        if not self._loss.learn_temperature:
            self._temperature.grad = None
        towers, temperature = self._dense.param_groups
        towers["lr"] = temperature["lr"] = settings.learning_rate * scale
        if loss.temperature_learning_rate is not None:
            temperature["lr"] = loss.temperature_learning_rate * scale
        self._dense.step()
        self._tables.step(gradients.tables, settings.table_learning_rate * scale, shrink)
        with torch.no_grad():
            if loss.final_temperature is not None:
                # A function of the step alone, so that a resumed run has the same.
                first, last = math.log(loss.temperature), math.log(loss.final_temperature)
                self._temperature.fill_(first + (last - first) * progress)
            else:
                self._temperature.clamp_(min=math.log(loss.min_temperature))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimisers."""
        return {"dense": self._dense.state_dict(), "tables": self._tables.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._dense.load_state_dict(state["dense"])
        self._tables.load_state_dict(state["tables"])


def schedule(config: Config, step: int, total: int) -> float:
    """Return the share of the peak learning rates at a step (from 0) of a run of ``total`` steps."""
    settings = config.train.optimizer
    warmup = round(settings.warmup_share * total)
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    if settings.schedule == "linear":
        return 1 - done
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0

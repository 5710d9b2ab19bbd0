"""The loss that a configuration asks for."""

from __future__ import annotations

from twotower.config.losses import LossConfig
from twotower.model.losses.protocol import Loss
from twotower.registry import imported


def choose_loss(settings: LossConfig) -> Loss:
    """Return the loss of ``train.loss.kind``."""
    loss: Loss = imported(type(settings.settings).implementation)(settings)
    return loss

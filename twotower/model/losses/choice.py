"""The loss that a configuration asks for."""

from __future__ import annotations

from twotower.config.training import LossConfig
from twotower.model.losses.bilateral import BilateralSoftmax
from twotower.model.losses.binary import BinaryCrossEntropy
from twotower.model.losses.protocol import Loss
from twotower.model.losses.softmax import in_batch_softmax
from twotower.model.losses.top_k import TopKSoftmax


def choose_loss(settings: LossConfig) -> Loss:
    """Return the loss of ``train.loss.kind``."""
    if settings.kind == "bsl":
        return BilateralSoftmax(settings.bsl.positive_temperature, settings.bsl.negative_power)
    if settings.kind == "bce":
        return BinaryCrossEntropy(settings.bce.calibration, settings.bce.offset, settings.log_q)
    if settings.kind == "slatk":
        return TopKSoftmax(settings.slatk.k, settings.slatk.width)
    return in_batch_softmax

"""The losses of ``train.loss.kind``: one protocol, one file each, over the same candidates and masks.

None holds a matrix of queries x candidates beyond a block of queries (``blocks``).
"""

from twotower.model.loss_masks import Known
from twotower.model.losses.choice import choose_loss
from twotower.model.losses.protocol import GlobalBatch, Loss
from twotower.model.losses.softmax import in_batch_softmax

__all__ = ["GlobalBatch", "Known", "Loss", "choose_loss", "in_batch_softmax"]

"""What every loss takes and gives.

Shapes: Q local queries, C candidates of the global batch, D embedding_dim, H own negatives of a query,
B queries of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from twotower.model.loss_masks import Known


@dataclass(frozen=True)
class GlobalBatch:
    """What a loss may ask of the global batch beside its candidates; the same on all ranks but ``first``."""

    users_B: Tensor
    """[B] int64, whose query it is; -1 is padding."""
    weight_B: Tensor
    """[B] float32, the weights of all queries; 0 for padding."""
    first: int
    """Where this rank's queries begin among them."""
    gather: Callable[[Tensor], Tensor]
    """Makes [Q] of this rank [B] of all ranks, without gradient; a collective."""
    num_items: int
    """Items of the catalogue."""


class Loss(Protocol):
    """The loss of queries that look for their positive among candidates."""

    def __call__(
        self,
        queries_QD: Tensor,
        candidates_CD: Tensor,
        positive_Q: Tensor,
        temperature: Tensor,
        log_q_C: Tensor,
        candidate_ids_C: Tensor,
        weight_Q: Tensor,
        *,
        mask_accidental_hits: bool,
        known: Known | None,
        own_QHD: Tensor | None,
        own_log_q_QH: Tensor | None,
        whole: Callable[[], GlobalBatch],
    ) -> Tensor:
        """Return the weighted sum of the queries' losses, a scalar in float32 (float64 for float64 queries).

        Args:
            queries_QD: [Q, D].
            candidates_CD: [C, D], finite also at padding.
            positive_Q: [Q] int64, column of each query's positive; any column for padding queries.
            temperature: scalar > 0; divides scores.
            log_q_C: [C] float32, log of how often the candidate is expected among a query's negatives.
            candidate_ids_C: [C] int64, equal for equal items; -1 is padding and takes part in nothing.
            weight_Q: [Q] float32; 0 for padding queries, which have no loss and no gradient.
            mask_accidental_hits: leave out other candidates with the positive's id.
            known: further candidates to leave out; the positive itself always stays.
            own_QHD: [Q, H, D], negatives of that query alone.
            own_log_q_QH: [Q, H] float32, their log_q; +inf where there is none. Zero when not given.
            whole: makes the global batch, for losses that need it.

        Collective: where the loss calls ``gather``; all ranks then do.
        Gradient: to queries, candidates, temperature and own negatives. The sum over ranks of the gradients
            is the gradient of the sum over ranks of the losses.
        """

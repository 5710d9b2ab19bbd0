"""In-batch softmax with logQ correction and masking of accidental hits.

Shapes: Q local queries, C candidates of the global batch, D embedding_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def in_batch_softmax(
    queries_QD: torch.Tensor,
    candidates_CD: torch.Tensor,
    positive_Q: torch.Tensor,
    temperature: torch.Tensor,
    log_q_C: torch.Tensor,
    candidate_ids_C: torch.Tensor,
    candidate_valid_C: torch.Tensor,
    mask_accidental_hits: bool,
    known_QC: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cross entropy of each query's positive among all candidates, [Q] float32.

    logits = scores / temperature - log_q. Candidates that are padding, and (with ``mask_accidental_hits``)
    candidates other than the positive with the positive's id, take no part.

    Args:
        queries_QD: [Q, D] float32, L2-normalised.
        candidates_CD: [C, D] float32, L2-normalised.
        positive_Q: [Q] int64, column of each query's positive.
        temperature: scalar > 0.
        log_q_C: [C] float32, log of the probability that the candidate enters a batch.
        candidate_ids_C: [C] int64, equal for equal items.
        candidate_valid_C: [C] bool, false at padding.
        mask_accidental_hits: leave out other candidates with the positive's id.
        known_QC: [Q, C] bool, true where the candidate is another known positive of the query; left out.

    Source: Yi et al.: Sampling-bias-corrected neural modeling for large corpus item recommendations
        (RecSys 2019), section 3 (logQ correction).
    """
    logits = queries_QD.float() @ candidates_CD.float().T / temperature - log_q_C
    left_out = ~candidate_valid_C[None, :]
    if mask_accidental_hits:
        left_out = left_out | (candidate_ids_C[None, :] == candidate_ids_C[positive_Q][:, None])
    if known_QC is not None:
        left_out = left_out | known_QC
    left_out = left_out.expand(len(queries_QD), -1).clone()
    left_out[torch.arange(len(positive_Q), device=positive_Q.device), positive_Q] = False
    return F.cross_entropy(logits.masked_fill(left_out, float("-inf")), positive_Q, reduction="none")

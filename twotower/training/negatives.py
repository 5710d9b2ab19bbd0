"""Negatives beside those of the batch: drawn candidates, the memory of past ones, and logQ of the mixture.

An item that is expected q times among a query's negatives counts 1 / q each time, so that it counts once on
average, whatever the mixture: the sum over the negatives then estimates that over the catalogue without bias.

Shapes: N catalogue items, M drawn candidates, K candidates of the memory, D embedding_dim.

Source: Bengio, Senecal: Adaptive importance sampling to accelerate training of a neural probabilistic
    language model (IEEE Transactions on Neural Networks 2008); Yi et al.: Sampling-bias-corrected neural
    modeling for large corpus item recommendations (RecSys 2019), section 3; for the mixture of in-batch and
    drawn negatives Yang et al.: Mixed negative sampling for learning two-tower neural networks in
    recommendations (WWW 2020), section 3.3.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from twotower.config.training import NegativesConfig
from twotower.schema import UNKNOWN_ROW

IntArray = npt.NDArray[np.int64]


class CandidateSampler:
    """Draws shared candidates, and knows how often an item is expected among those of a step.

    Every probability of sampling is here: that of being a positive of a step, from which the batch and the
    memory come, and that of being drawn, by popularity or uniformly. An item without an example is drawn as
    if it had one, or not at all where ``negatives.unchosen`` is ``new``.
    """

    def __init__(self, item_counts: IntArray, config: NegativesConfig, seed: int) -> None:
        """Take how many examples each catalogue item has, [N] int64, at least one of all of them."""
        self._config = config
        self._seed = seed
        self._positive = item_counts / item_counts.sum()
        self.unchosen = item_counts == 0
        """[N] bool, items that are no positive."""
        weights = item_counts if config.unchosen == "new" else np.maximum(item_counts, 1)
        self._drawable = np.flatnonzero(weights)
        may_be_negative = self.num_drawn + config.explicit + config.mined.per_query > 0
        own_row = may_be_negative and config.unchosen == "negative" and self.unchosen.any()
        self.unchosen_row = UNKNOWN_ROW + 1 + int(self.unchosen.argmax()) if own_row else UNKNOWN_ROW
        """Row of the table of item ids that stands for every item without an example.

        Where such items may be negatives it is that of the first of them: the unknown id, which items read
        that come later, must not learn that nobody wants them. Elsewhere it is the unknown id's.
        """
        self._cumulated = np.cumsum(weights)
        by_popularity = weights / self._cumulated[-1]
        self._drawn = config.popular * by_popularity + config.uniform * (weights > 0) / len(self._drawable)

    @property
    def num_drawn(self) -> int:
        """M, the candidates drawn for each step."""
        return self._config.uniform + self._config.popular

    def draw(self, step: int) -> IntArray:
        """Return the drawn candidates of a step, [M] int64 item rows: the same on every rank."""
        random = np.random.default_rng([self._seed, 3, step])
        uniform = self._drawable[random.integers(0, len(self._drawable), self._config.uniform)]
        ticket = random.integers(0, self._cumulated[-1], self._config.popular)
        popular = np.searchsorted(self._cumulated, ticket, side="right")
        return np.concatenate([uniform, popular]).astype(np.int64)

    def expected_count(self, item_rows: IntArray, batch: int, memory: int) -> npt.NDArray[np.float32]:
        """Return how often each item is expected among shared candidates, [...] float32.

        Over the catalogue this adds up to ``batch + memory + num_drawn``. It is 0 for an item without an
        example where nothing is drawn: such an item is never a shared candidate.

        Args:
            item_rows: catalogue items, any shape; -1 gets a number without meaning.
            batch: positives of the step that are counted, each an example like any other.
            memory: candidates of past steps, which were positives of them.
        """
        return ((batch + memory) * self._positive[item_rows] + self._drawn[item_rows]).astype(np.float32)

    def log_q(self, item_rows: IntArray, batch: int, memory: int) -> npt.NDArray[np.float32]:
        """Return the correction of each shared candidate's logit in a step, float32 in the rows' shape.

        Every query has one positive of the batch as its own, so its negatives are the others. The positive's
        logit is corrected in the same way, as in Yi et al.

        Args:
            item_rows: candidates of the step; -1 gets a number without meaning.
            batch: examples of the global batch.
            memory: candidates of past steps among these.
        """
        expected = self.expected_count(item_rows, batch - 1, memory)
        # Nothing is expected where an example is alone: there is no other candidate, and 0 is a number.
        return np.log(expected, out=np.zeros_like(expected), where=expected > 0)


class CandidateMemory:
    """The latest candidates of past steps, as constants; the same on every rank.

    Source: Wang et al.: Cross-batch negative sampling for training two-tower recommenders (SIGIR 2021).
    """

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        """Start empty, with room for K = ``size`` vectors."""
        self.vectors = torch.zeros(size, dim, device=device)
        self.item_rows = torch.full((size,), -1, dtype=torch.int64)
        self._next = 0

    def __len__(self) -> int:
        """Return how many vectors are kept."""
        return int((self.item_rows >= 0).sum())

    def push(self, vectors: torch.Tensor, item_rows: torch.Tensor) -> None:
        """Keep candidates [n, D] with their items [n] int64 on the CPU in place of the oldest ones."""
        size = len(self.item_rows)
        vectors, item_rows = vectors[-size:], item_rows[-size:]
        place = (self._next + torch.arange(len(item_rows))) % max(size, 1)
        self.vectors[place.to(self.vectors.device)] = vectors.detach().float()
        self.item_rows[place] = item_rows
        self._next = (self._next + len(item_rows)) % max(size, 1)

    def state_dict(self) -> dict[str, object]:
        """Return the content for a checkpoint."""
        return {"vectors": self.vectors.cpu(), "item_rows": self.item_rows, "next": self._next}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what ``state_dict`` returned."""
        vectors, item_rows, place = state["vectors"], state["item_rows"], state["next"]
        assert isinstance(vectors, torch.Tensor)
        assert isinstance(item_rows, torch.Tensor)
        assert isinstance(place, int)
        self.vectors.copy_(vectors)
        self.item_rows.copy_(item_rows)
        self._next = place

"""Negatives beside those of the batch: drawn candidates, the memory of past ones, and logQ of the mixture.

Shapes: N catalogue items, M drawn candidates, K candidates of the memory, D embedding_dim.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from twotower.config.training import NegativesConfig

IntArray = npt.NDArray[np.int64]


class CandidateSampler:
    """Draws shared candidates, and knows how often an item is expected among those of a step."""

    def __init__(self, item_counts: IntArray, config: NegativesConfig, seed: int) -> None:
        """Take how often each catalogue item is a positive, [N] int64; an item without any counts as one."""
        counts = np.maximum(item_counts, 1)
        self._share = (counts / item_counts.sum()).astype(np.float64)
        self._cumulated = np.cumsum(counts)
        self._config = config
        self._seed = seed

    @property
    def num_drawn(self) -> int:
        """M, the candidates drawn for each step."""
        return self._config.uniform + self._config.popular

    def draw(self, step: int) -> IntArray:
        """Return the drawn candidates of a step, [M] int64 item rows: the same on every rank."""
        random = np.random.default_rng([self._seed, 3, step])
        uniform = random.integers(0, len(self._share), self._config.uniform)
        ticket = random.integers(0, self._cumulated[-1], self._config.popular)
        popular = np.searchsorted(self._cumulated, ticket, side="right")
        return np.concatenate([uniform, popular]).astype(np.int64)

    def expected_count(self, item_rows: IntArray, batch: int, memory: int) -> npt.NDArray[np.float32]:
        """Return how often each item is expected among a step's shared candidates, [...] float32.

        A candidate that is expected q times stands for 1 / q of itself in the softmax's denominator, so its
        logit is corrected by log q; a constant factor of q changes nothing.

        Source: Yi et al.: Sampling-bias-corrected neural modeling (RecSys 2019), section 3; for the mixture
            of in-batch and uniform negatives Yang et al.: Mixed negative sampling for learning two-tower
            neural networks in recommendations (WWW 2020), section 3.3.

        Args:
            item_rows: catalogue items, any shape; -1 gets a number without meaning.
            batch: positives of the global batch, each drawn in proportion to popularity.
            memory: candidates of past batches.
        """
        by_popularity = batch + memory + self._config.popular
        uniformly = self._config.uniform / len(self._share)
        return (by_popularity * self._share[item_rows] + uniformly).astype(np.float32)


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

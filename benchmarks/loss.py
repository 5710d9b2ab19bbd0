"""The blocked in-batch softmax against a dense one and against torch's linear_cross_entropy.

Forward and backward, time and extra memory. Batches have Zipf-distributed items, as in-batch negatives do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from twotower.model.losses import in_batch_softmax

THREADS = 2
DIM = 128
NUM_ITEMS = 50_000
TEMPERATURE = 0.07

# The default (the reference implementation), what torch picks itself, and its best on two Zen 5 cores of all
# chunking methods and accumulation policies.
LINEAR_CROSS_ENTROPY: dict[str, Any] = {
    "linear_cross_entropy": None,
    "linear_cross_entropy, auto": torch.nn.LinearCrossEntropyOptions(),
    "linear_cross_entropy, chunked": torch.nn.LinearCrossEntropyOptions(
        chunking_method="aspect_ratio:1", acc_policy="accurate"
    ),
}


def make_batch(size: int) -> dict[str, Any]:
    """Make unit vectors, and items whose popularity follows Zipf's law."""
    rng = np.random.default_rng(0)
    probability = 1 / np.arange(1, NUM_ITEMS + 1)
    probability /= probability.sum()
    items = rng.choice(NUM_ITEMS, size, p=probability)
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (
        F.normalize(torch.randn(size, DIM, generator=generator), dim=1).requires_grad_() for _ in range(2)
    )
    return {
        "queries_QD": queries,
        "candidates_CD": candidates,
        "positive_Q": torch.arange(size),
        "temperature": torch.tensor(TEMPERATURE, requires_grad=True),
        "log_q_C": torch.from_numpy(np.log(probability[items])).float(),
        "candidate_ids_C": torch.from_numpy(items),
        "weight_Q": torch.full((size,), 1 / size),
    }


def blocked_loss(batch: dict[str, Any], *, masked: bool) -> Tensor:
    return in_batch_softmax(**batch, mask_accidental_hits=masked)


def dense_loss(batch: dict[str, Any]) -> Tensor:
    positive, ids = batch["positive_Q"], batch["candidate_ids_C"]
    logits = batch["queries_QD"] @ batch["candidates_CD"].T / batch["temperature"] - batch["log_q_C"]
    left_out = ids[positive, None] == ids
    left_out[torch.arange(len(positive)), positive] = False
    losses = F.cross_entropy(logits.masked_fill(left_out, float("-inf")), positive, reduction="none")
    return (losses * batch["weight_Q"]).sum()


def torch_loss(batch: dict[str, Any], options: Any) -> Tensor:
    """Return torch's fused loss of the same logits; all weights are 1 / Q."""
    return F.linear_cross_entropy(
        batch["queries_QD"] / batch["temperature"],
        batch["candidates_CD"],
        batch["positive_Q"],
        linear_bias=-batch["log_q_C"],
        options=options,
    )


def step(loss: Callable[..., Tensor], batch: dict[str, Any], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the loss and the queries' gradient, after forgetting the gradients of the last step."""
    for name in ("queries_QD", "candidates_CD", "temperature"):
        batch[name].grad = None
    value = loss(batch, **kwargs)
    value.backward()
    return value.detach(), batch["queries_QD"].grad


def dense_step(size: int) -> Callable[[], object]:
    return partial(step, dense_loss, make_batch(size))


def blocked_step(size: int) -> Callable[[], object]:
    return partial(step, blocked_loss, make_batch(size), masked=True)


def main() -> None:
    quick = measure.start("Blocked in-batch softmax: time and extra memory.", THREADS)
    size = 1024 if quick else 8192
    batch = make_batch(size)
    masked = {
        "blocked, masked": partial(step, blocked_loss, batch, masked=True),
        "dense, masked": partial(step, dense_loss, batch),
    }
    unmasked = {"blocked": partial(step, blocked_loss, batch, masked=False)} | {
        name: partial(step, torch_loss, batch, options=options)
        for name, options in LINEAR_CROSS_ENTROPY.items()
    }
    for group in (masked, unmasked):
        ours, *others = (call() for call in group.values())
        for other in others:
            torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-6)
    samples = measure.times(masked, 3 if quick else 9) | measure.times(unmasked, 3 if quick else 9)
    fastest = min(LINEAR_CROSS_ENTROPY, key=lambda name: samples[name].median)
    memory = {
        name: measure.peak_extra_bytes(f"benchmarks.loss:{function}", {"size": rows}, THREADS)
        for name, function, rows in (
            ("blocked, masked", "blocked_step", size),
            ("dense, masked", "dense_step", size),
            ("blocked, masked, 4 x batch", "blocked_step", 4 * size),
        )
    }
    figures = {
        "blocked_over_dense_time": samples["blocked, masked"].over(samples["dense, masked"]),
        "blocked_over_linear_cross_entropy_time": samples["blocked"].over(samples[fastest]),
        "dense_over_blocked_memory": memory["dense, masked"] / memory["blocked, masked"],
        "memory_growth_4x": memory["blocked, masked, 4 x batch"] / memory["blocked, masked"],
    }
    table = [(f"batch {size}, d = {DIM}", "time", "extra memory")] + [
        (name, samples.get(name, ""), f"{memory[name] / 2**20:.0f} MiB" if name in memory else "")
        for name in dict.fromkeys([*samples, *memory])
    ]
    measure.finish("loss", figures, table, quick)


if __name__ == "__main__":
    main()

"""Very large batches on one GPU: examples/s and extra memory of whole steps, and blocked over dense loss.

Needs a GPU; without one it says so and measures nothing.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.train import DIM, configuration
from twotower.config import parse_config
from twotower.data.prepare import prepare
from twotower.model.losses import in_batch_softmax
from twotower.training.collectives import World
from twotower.training.loop import Trainer

BATCHES = (65_536, 262_144)
CHUNK = 16_384
STEPS = 10


def trained(batch: int) -> tuple[float, float]:
    """Return examples/s and the extra GPU memory in GiB of steps at a global batch."""
    with tempfile.TemporaryDirectory() as root:
        values = copy.deepcopy(configuration(root, round(batch * (STEPS + 4) * 1.2), batch, 1).to_json())
        values["train"]["tower_chunk_size"] = CHUNK
        config = parse_config(values)
        trainer = Trainer(config, prepare(config), World(device=torch.device("cuda")), "all")
    batches = (trainer.assemble(share, n) for n, share in enumerate(trainer.source.shares(0)))

    def step() -> None:
        gradients = trainer.compute.gradients(next(batches))
        trainer.optimizers.update(gradients, trainer.optimizers.gradient_norm(gradients), 1.0)

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    rate = STEPS * batch / (time.perf_counter() - begin)
    return rate, (torch.cuda.max_memory_allocated() - before) / 2**30


def loss_time(batch: int, blocked: bool) -> float:
    """Return the median seconds of one loss, forward and backward, with same-item masks and logQ."""
    generator = torch.Generator("cuda").manual_seed(0)
    queries, items = (
        F.normalize(torch.randn(batch, DIM, device="cuda", generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    ids = torch.randint(0, 100_000, (batch,), device="cuda", generator=generator)
    log_q = torch.randn(batch, device="cuda", generator=generator)
    target = torch.arange(batch, device="cuda")
    temperature = torch.tensor(0.07, device="cuda", requires_grad=True)

    def dense() -> torch.Tensor:
        logits = queries @ items.T / temperature - log_q
        same = ids[None, :] == ids[:, None]
        same.fill_diagonal_(False)
        return F.cross_entropy(logits.masked_fill(same, -torch.inf), target)

    def ours() -> torch.Tensor:
        weight = torch.full((batch,), 1 / batch, device="cuda")
        return in_batch_softmax(
            queries, items, target, temperature, log_q, ids, weight, mask_accidental_hits=True
        )

    def run() -> None:
        (ours() if blocked else dense()).backward()
        torch.cuda.synchronize()

    return measure.times({"": run}, repeats=7)[""].median


def main() -> None:
    """Measure where there is a GPU."""
    quick = measure.start("Very large batches on one GPU.", 4)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU here, nothing measured", file=sys.stderr)
        return
    figures: dict[str, float] = {}
    table: list[tuple[object, ...]] = [
        ("global batch", "examples/s", "extra GPU memory", "blocked over dense")
    ]
    for batch in (4_096,) if quick else BATCHES:
        rate, extra = trained(batch)
        ratio = ""
        figures |= {f"examples_per_s_{batch}": rate, f"extra_gib_{batch}": extra}
        try:
            over = loss_time(batch, blocked=True) / loss_time(batch, blocked=False)
            figures[f"blocked_over_dense_time_{batch}"] = over
            ratio = f"{over:.2f}"
        except torch.cuda.OutOfMemoryError:
            ratio = "dense does not fit"
        table.append((f"{batch:,}", f"{rate:,.0f}", f"{extra:.2f} GiB", ratio))
    measure.finish("gpu", figures, table, quick)


if __name__ == "__main__":
    main()

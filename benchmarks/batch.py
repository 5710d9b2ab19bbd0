"""A very large batch on a small machine: extra memory of one training step with feature towers.

Towers in chunks and a blocked loss make memory a matter of the embeddings, not of the batch squared.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

from benchmarks import measure
from benchmarks.train import configuration
from twotower.config import parse_config
from twotower.data.prepare import prepare
from twotower.training.collectives import World
from twotower.training.loop import Trainer

THREADS = 2
BATCH = 32_768
CHUNK = 2_048


def one_step(batch: int, chunk: int | None) -> Callable[[], object]:
    """Return one whole step (batch, gradients, update) of a training that has made none."""
    with tempfile.TemporaryDirectory() as root:
        config = configuration(root, round(batch * 1.2), batch, 1)
        values = copy.deepcopy(config.to_json())
        values["train"]["tower_chunk_size"] = chunk
        config = parse_config(values)
        trainer = Trainer(config, prepare(config), World(), "all")

    def step() -> None:
        gradients = trainer.compute.gradients(trainer.assemble(next(trainer.source.shares(0)), 0))
        norm = trainer.optimizers.gradient_norm(gradients)
        trainer.optimizers.update(gradients, norm, 1.0)

    return step


def main() -> None:
    """Measure the step with and without chunks."""
    quick = measure.start("Extra memory of a training step at a large batch.", THREADS)
    batch = 2_048 if quick else BATCH
    extra = {
        chunk: measure.peak_extra_bytes(
            "benchmarks.batch:one_step", {"batch": batch, "chunk": chunk}, THREADS
        )
        for chunk in (CHUNK, None)
    }
    gib = {chunk: value / 2**30 for chunk, value in extra.items()}
    table = [
        ("towers", "global batch", "extra memory"),
        (f"chunks of {CHUNK:,} rows", f"{batch:,}", f"{gib[CHUNK]:.2f} GiB"),
        ("all rows at once", f"{batch:,}", f"{gib[None]:.2f} GiB"),
    ]
    figures = {"peak_extra_gib": gib[CHUNK], "peak_extra_gib_without_chunks": gib[None]}
    measure.finish("batch", figures, table, quick)


if __name__ == "__main__":
    main()

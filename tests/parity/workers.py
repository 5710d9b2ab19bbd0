"""Runs training steps in spawned gloo processes and brings their gradients back."""

import os
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.apart import START
from twotower.cluster.processes import free_port
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.training.collectives import World
from twotower.training.loop import Trainer


def step_results(
    trainer: Trainer, steps: list[int], update: bool = True, epoch: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Return loss and gradients by tensor name of each of some steps, and the weights after them."""
    results = []
    trainer.model.train()
    negatives = trainer.config.train.negatives.mined.per_query
    if negatives:
        # Mining itself rounds differently in each world; here the same lists are given to all.
        shape = (len(trainer.source.examples), negatives)
        drawn = np.random.default_rng(3).integers(-1, trainer.inputs.num_catalogue_items, shape)
        trainer.assemble.mined = drawn.astype(np.int32)
    for step in steps:
        batch = trainer.assemble(next(trainer.source.shares(epoch, step)), step)
        gradients = trainer.compute.gradients(batch)
        found = {"loss": torch.tensor(gradients.loss, dtype=torch.float64)}
        for name, parameter in trainer.model.towers.named_parameters():
            assert parameter.grad is not None
            found[f"towers.{name}"] = parameter.grad.clone()
        assert trainer.model.log_temperature.grad is not None
        found["log_temperature"] = trainer.model.log_temperature.grad.clone()
        for name, (ids, rows) in gradients.tables.items():
            dense = torch.zeros(trainer.model.tables[name].shape)
            dense[ids] = rows
            found[f"tables.{name}"] = dense
        if update:
            trainer.optimizers.update(gradients, trainer.optimizers.gradient_norm(gradients), 1.0)
        results.append(found)
    # What is fitted after an epoch is compared by itself.
    state = {n: t for n, t in trainer.model.state_dict().items() if not n.startswith("unknown_items.")}
    weights = {f"weights.{n}": t.clone() for n, t in state.items()}
    return [*results, weights]


def _run(rank: int, size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    work = torch.load(Path(out) / "work.pt", weights_only=True)
    results = []
    for config in work["configs"]:
        trainer = Trainer(parse_config(config), Dataset.open(work["dataset"]), World.current(), "train")
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
            found = step_results(trainer, work["steps"], work["update"])
        found[-1]["reductions"] = torch.tensor(reduce.call_count)
        results.append(found)
    torch.save(results, Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_world(
    configs: list[Config], dataset: Dataset, size: int, steps: list[int], out: Path, update: bool = True
) -> list[list[list[dict]]]:
    """Return the results of every configuration of every rank of a world of gloo processes."""
    out.mkdir()
    plain = [c.to_json() for c in configs]
    torch.save(
        {"configs": plain, "dataset": str(dataset.path), "steps": steps, "update": update}, out / "work.pt"
    )
    mp.start_processes(_run, args=(size, free_port(), str(out)), nprocs=size, start_method=START)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(size)]


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5
) -> None:
    """Assert norm(difference) <= relative * norm(expected) for every tensor, none of them zero."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        norm = value.double().norm()
        assert norm > 0, f"{name} is all zero: the comparison would be empty"
        difference = (found[name].double() - value.double()).norm() / norm
        assert difference <= relative, f"{name}: relative difference {difference:.2e}"

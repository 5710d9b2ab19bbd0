"""Runs training steps in spawned gloo processes and brings their gradients back."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.training.collectives import World
from twotower.training.loop import Trainer


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def step_results(trainer: Trainer, steps: list[int], epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return loss and gradients by tensor name of each of some steps, updating the model after each."""
    order = trainer.order(epoch)
    results = []
    trainer.model.train()
    for number, step in enumerate(steps):
        found = {"loss": trainer.gradients(order, epoch, step).clone()}
        for name, parameter in trainer.model.towers.named_parameters():
            assert parameter.grad is not None
            found[f"towers.{name}"] = parameter.grad.clone()
        assert trainer.model.log_temperature.grad is not None
        found["log_temperature"] = trainer.model.log_temperature.grad.clone()
        for name, (ids, rows) in trainer.table_gradients.items():
            dense = torch.zeros_like(trainer.model.tables[name])
            dense[ids] = rows
            found[f"tables.{name}"] = dense
        trainer.update(number)
        results.append(found)
    weights = {f"weights.{n}": t.clone() for n, t in trainer.model.state_dict().items()}
    return [*results, weights]


def _run(rank: int, size: int, port: int, config: dict, dataset: str, steps: list[int], out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    trainer = Trainer(parse_config(config), Dataset.open(dataset), World.current(), "train")
    torch.save(step_results(trainer, steps), Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_world(config: Config, dataset: Dataset, size: int, steps: list[int], out: Path) -> list[list[dict]]:
    """Return the results of every rank of a world of gloo processes."""
    out.mkdir()
    args = (size, free_port(), config.to_json(), str(dataset.path), steps, str(out))
    mp.start_processes(_run, args=args, nprocs=size, start_method="spawn")
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

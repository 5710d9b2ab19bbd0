"""Maps of unknown items, and rows made by them, on several ranks and on one."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.parity.workers import START, assert_close, free_port
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.training.collectives import World
from twotower.training.loop import Trainer


def fitted(config: Config, dataset: Dataset) -> dict[str, torch.Tensor]:
    """The tensors of a fresh model whose unknown items were fitted."""
    trainer = Trainer(config, dataset, World.current(), "train")
    trainer._fit_unknown(trainer.model, trainer.inputs, trainer.world)
    state = trainer.model.state_dict()
    return {n: t.double() for n, t in state.items() if n.startswith(("unknown_items.", "tables.id_of_item"))}


def _run(rank: int, size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    work = torch.load(Path(out) / "work.pt", weights_only=True)
    found = fitted(parse_config(work["config"]), Dataset.open(work["dataset"]))
    torch.save(found, Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_fit_what_one_process_fits(size: int, small_config: Config, tmp_path: Path) -> None:
    values = copy.deepcopy(small_config.to_json())
    values["storage"]["root"] = str(tmp_path)
    values["data"]["source"] |= {"num_items": 401, "num_interactions": 1_500}
    values["train"] |= {"num_workers": 1, "negatives": {"uniform": 50}}
    config = parse_config(values)
    dataset = prepare(config)
    alone = fitted(config, dataset)
    assert 0 < alone["unknown_items.untrained"].sum() < 300
    (tmp_path / "out").mkdir()
    work = {"config": config.to_json(), "dataset": str(dataset.path)}
    torch.save(work, tmp_path / "out" / "work.pt")
    mp.start_processes(_run, args=(size, free_port(), str(tmp_path / "out")), nprocs=size, start_method=START)
    ranks = [torch.load(tmp_path / "out" / f"{r}.pt", weights_only=True) for r in range(size)]
    for found in ranks:
        assert_close(found, alone)
        for name, tensor in found.items():
            assert torch.equal(tensor, ranks[0][name]), f"{name} differs between ranks"

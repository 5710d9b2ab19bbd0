"""Row gradients of several tables, gathered over gloo processes, are those of one process with all bags."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.apart import START
from tests.parity.workers import assert_close
from twotower.cluster.processes import free_port
from twotower.model.batch import Bag
from twotower.training.collectives import World
from twotower.training.tables import RowGradient, TouchedRows

WIDTHS = {"a": 3, "b": 5, "empty": 2}
R = 40


def tables() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(R, width, generator=g) for name, width in WIDTHS.items()}


def bags_of(rank: int) -> list[tuple[str, Bag]]:
    """Return bags of different sizes on each rank, with rows that ranks share and rows that they do not."""
    g = torch.Generator().manual_seed(20 + rank)
    shapes = {"a": (4 + rank, 6), "b": (9 - 2 * rank, 1)}
    bags = []
    for name, shape in shapes.items():
        ids = torch.randint(-1 if shape[1] > 1 else 0, R // 2, shape, generator=g)
        bags.append((name, Bag(ids, torch.rand(shape, generator=g) * (ids >= 0))))
    return [*bags, ("empty", Bag(torch.full((2, 2), -1), torch.zeros(2, 2)))]


def gradients(bags: list[tuple[str, Bag]], world: World) -> dict[str, RowGradient]:
    touched = TouchedRows(tables(), bags)
    sum((touched.lookup(name, bag).sin() * 1.3).sum() for name, bag in bags if name != "empty").backward()
    return touched.gradients(world)


def _run(rank: int, size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.save(gradients(bags_of(rank), World.current()), Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_sums_over_ranks_equal_one_process(size: int, tmp_path: Path) -> None:
    mp.start_processes(_run, args=(size, free_port(), str(tmp_path)), nprocs=size, start_method=START)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    expected = gradients([bag for rank in range(size) for bag in bags_of(rank)], World())
    assert ranks[0].keys() == expected.keys() == WIDTHS.keys()
    for name, (ids, rows) in expected.items():
        for other in ranks:
            assert torch.equal(other[name][0], ids), name
            assert torch.equal(other[name][1], ranks[0][name][1]), f"{name} differs between ranks"
        assert ranks[0][name][1].shape == (len(ids), WIDTHS[name])
        if name != "empty":
            assert 5 < len(ids) <= R // 2
            assert_close({name: ranks[0][name][1]}, {name: rows})
    own = [set(bag.ids.flatten().tolist()) for rank in range(size) for _, bag in bags_of(rank)[:1]]
    assert own[0] & own[1], "ranks must share rows for their sum to be tested"
    assert own[0] - own[1], "ranks must differ in their rows"

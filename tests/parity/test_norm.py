"""Global batch norm in 2 and 3 gloo processes equals torch's in one, with uneven shares and padding."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.apart import START
from tests.parity.workers import assert_close
from twotower.cluster.processes import free_port
from twotower.model.norm import GlobalBatchNorm

E = 6
SHARES = [(9, 7), (5, 5), (8, 1)]
"""Of each rank: rows, and how many of them are valid."""


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(_ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(None, grad)


def share_of(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a rank's rows, which of them are valid, and the gradient from above."""
    rows, valid = SHARES[rank]
    g = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(rows, E, generator=g) * 3 + rank
    return x, torch.arange(rows) < valid, torch.randn(rows, E, generator=g)


def _run(rank: int, size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    layer = GlobalBatchNorm(E)
    layer.all_reduce = _Sum.apply
    for step in range(2):
        x, valid, upstream = share_of(rank, step)
        x.requires_grad_()
        y = layer(x, valid)
        (y * upstream)[valid].sum().backward()
    assert x.grad is not None
    found = {"y": y.detach()[valid], "x.grad": x.grad[valid]}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        found[f"{name}.grad"] = parameter.grad
    found |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    torch.save(found, Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_equals_torch_on_the_global_batch(size: int, tmp_path: Path) -> None:
    mp.start_processes(_run, args=(size, free_port(), str(tmp_path)), nprocs=size, start_method=START)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    reference = torch.nn.BatchNorm1d(E)
    for step in range(2):
        shares = [share_of(rank, step) for rank in range(size)]
        x = torch.cat([x[valid] for x, valid, _ in shares]).requires_grad_()
        y = reference(x)
        (y * torch.cat([upstream[valid] for _, valid, upstream in shares])).sum().backward()
    assert x.grad is not None
    assert reference.weight.grad is not None
    assert reference.bias.grad is not None
    expected = {
        "y": y.detach(),
        "x.grad": x.grad,
        "weight.grad": reference.weight.grad,
        "bias.grad": reference.bias.grad,
        "running_mean": reference.running_mean,
        "running_var": reference.running_var,
    }
    found = {name: ranks[0][name] for name in expected}
    for name in ("y", "x.grad"):
        found[name] = torch.cat([rank[name] for rank in ranks])
    assert_close(found, expected)
    for other in ranks[1:]:
        for name in ("weight.grad", "bias.grad", "running_mean", "running_var"):
            assert torch.equal(other[name], ranks[0][name]), f"{name} differs between ranks"

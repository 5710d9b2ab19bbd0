"""Normalisation: global batch norm against torch's on the valid rows, and outputs of length 1 or not."""

import pytest
import torch

from twotower.config import TowerConfig
from twotower.model.norm import GlobalBatchNorm
from twotower.model.towers import Tower

B, E = 23, 7


def make_rows(offset: float = 3.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(B, E, generator=g) * torch.arange(1, E + 1) + offset


@pytest.mark.parametrize("padding", [0, 6])
def test_equals_torch_on_the_valid_rows(padding: int) -> None:
    valid = torch.arange(B) < B - padding
    ours, theirs = GlobalBatchNorm(E), torch.nn.BatchNorm1d(E)
    with torch.no_grad():
        for parameter in ("weight", "bias"):
            value = torch.rand(E) + 0.5
            getattr(ours, parameter).copy_(value)
            getattr(theirs, parameter).copy_(value)
    upstream = torch.randn(B, E)
    for step in range(3):
        x, y = make_rows(step).requires_grad_(), make_rows(step)[valid].requires_grad_()
        mine = ours(x, None if padding == 0 else valid)[valid]
        reference = theirs(y)
        torch.testing.assert_close(mine, reference)
        mine.backward(upstream[valid])
        reference.backward(upstream[valid])
        assert x.grad is not None
        assert y.grad is not None
        torch.testing.assert_close(x.grad[valid], y.grad, atol=1e-6, rtol=1e-4)
        assert y.grad.abs().min() > 0
        assert (x.grad[~valid] == 0).all()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    x = make_rows()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    x = make_rows() * 0.01 + 1000.0
    expected = torch.nn.BatchNorm1d(E).double()(x.double())
    torch.testing.assert_close(GlobalBatchNorm(E)(x).double(), expected, atol=0.02, rtol=0.01)
    assert expected.abs().max() > 1


def test_evaluation_uses_the_running_statistics_and_leaves_them() -> None:
    layer = GlobalBatchNorm(E).eval()
    x = make_rows()
    torch.testing.assert_close(layer(x[:1]), x[:1], rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.running_mean, torch.zeros(E))


def test_a_low_precision_input_is_normalised_in_float32() -> None:
    x = make_rows().bfloat16()
    found = GlobalBatchNorm(E)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, GlobalBatchNorm(E)(x.float()).bfloat16())


@pytest.mark.parametrize("normalize", [True, False])
def test_padding_does_not_reach_the_valid_rows_of_a_tower(normalize: bool) -> None:
    torch.manual_seed(0)
    tower = Tower(E, 5, TowerConfig(hidden=[11], norm="batch", dropout=0.0), None, normalize)
    x, other = make_rows(), make_rows()
    valid = torch.arange(B) < 20
    other[20:] *= -50
    whole = tower(x, None, valid)
    assert torch.equal(whole[:20], tower(other, None, valid)[:20])
    assert not torch.allclose(whole[:20], tower(x)[:20])
    assert torch.allclose(whole.norm(dim=1), torch.ones(B)) == normalize


def test_without_normalize_the_output_is_that_of_the_last_layer() -> None:
    tower = Tower(E, 5, TowerConfig(hidden=[], dropout=0.0), None, False)
    x = make_rows()
    torch.testing.assert_close(tower(x), x @ tower.output.weight.T + tower.output.bias)
    tower.normalize = True
    torch.testing.assert_close(tower(x), torch.nn.functional.normalize(tower.output(x), dim=-1))

"""Row-wise table updates against dense autograd and torch's own optimisers."""

import pytest
import torch

from twotower.model.features import Bag
from twotower.model.towers import pool
from twotower.training.collectives import World
from twotower.training.tables import TableOptimizer, TouchedRows

R, E = 31, 6


def make_bags() -> list[tuple[str, Bag]]:
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(-1, R - 9, (8, 5), generator=g)
    weights = torch.rand(8, 5, generator=g) * (ids >= 0)
    single = torch.randint(0, R - 9, (8, 1), generator=g)
    return [
        ("t", Bag(ids, weights)),
        ("t", Bag(single, torch.ones(8, 1))),
        ("empty", Bag(-torch.ones(8, 2).long(), torch.zeros(8, 2))),
    ]


def test_gradients_of_touched_rows_equal_dense_autograd() -> None:
    tables = {"t": torch.randn(R, E), "empty": torch.randn(4, 3)}
    bags = make_bags()
    touched = TouchedRows(tables, bags)
    sum((touched.lookup(name, bag).sin() * 1.7).sum() for name, bag in bags).backward()
    dense = tables["t"].clone().requires_grad_()
    sum(
        (pool(dense, bag.ids.clamp(min=0), bag.weights).sin() * 1.7).sum()
        for name, bag in bags
        if name == "t"
    ).backward()
    ids, grad = touched.gradients(World())["t"]
    assert dense.grad is not None
    assert 5 < len(ids) < R
    torch.testing.assert_close(grad, dense.grad[ids])
    untouched = torch.ones(R, dtype=torch.bool)
    untouched[ids] = False
    assert (dense.grad[untouched] == 0).all()
    assert len(touched.gradients(World())["empty"][0]) == 0


def test_lazy_adam_equals_adam_where_every_row_is_touched() -> None:
    start = torch.randn(R, E)
    ours, theirs = {"t": start.clone()}, torch.nn.Parameter(start.clone())
    optimizer, reference = TableOptimizer(ours, "lazy_adam"), torch.optim.Adam([theirs], lr=0.03)
    for step in range(5):
        grad = torch.randn(R, E, generator=torch.Generator().manual_seed(step))
        optimizer.step({"t": (torch.arange(R), grad)}, 0.03)
        theirs.grad = grad
        reference.step()
    torch.testing.assert_close(ours["t"], theirs.data)
    assert (ours["t"] - start).abs().min() > 0


@pytest.mark.parametrize("kind", ["lazy_adam", "rowwise_adagrad"])
def test_only_touched_rows_move_and_state_comes_back(kind) -> None:
    tables = {"t": torch.randn(R, E)}
    before = tables["t"].clone()
    optimizer = TableOptimizer(tables, kind)
    ids = torch.tensor([2, 5, 30])
    optimizer.step({"t": (ids, torch.randn(3, E))}, 0.1)
    moved = (tables["t"] != before).any(1)
    assert moved.nonzero().flatten().tolist() == ids.tolist()
    other = {"t": tables["t"].clone()}
    restored = TableOptimizer(other, kind)
    restored.load_state_dict(optimizer.state_dict())
    grad = torch.randn(3, E)
    optimizer.step({"t": (ids, grad)}, 0.1)
    restored.step({"t": (ids, grad)}, 0.1)
    assert torch.equal(tables["t"], other["t"])


def test_rowwise_adagrad_by_hand() -> None:
    tables = {"t": torch.zeros(3, 2)}
    optimizer = TableOptimizer(tables, "rowwise_adagrad")
    for _ in range(2):
        optimizer.step({"t": (torch.tensor([1]), torch.tensor([[3.0, 1.0]]))}, 0.5)
    # The mean of squares is 5; the sums are 5 and 10.
    expected = -0.5 * 3 * (5**-0.5 + 10**-0.5)
    assert tables["t"][1, 0].item() == pytest.approx(expected, rel=1e-6)

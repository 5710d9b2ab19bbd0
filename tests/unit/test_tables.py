"""Row-wise table updates against dense autograd and torch's own optimisers."""

import pytest
import torch

from twotower.model.batch import Bag
from twotower.model.dropout import row_keys
from twotower.model.towers import pool
from twotower.training.collectives import World
from twotower.training.tables import TableOptimizer, TouchedRows, round_stochastically

R, E = 31, 6


def make_bags(rows: int = R - 9) -> list[tuple[str, Bag]]:
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(-1, rows, (8, 5), generator=g)
    weights = torch.rand(8, 5, generator=g) * (ids >= 0)
    single = torch.randint(0, rows, (8, 1), generator=g)
    return [
        ("t", Bag(ids, weights)),
        ("t", Bag(single, torch.ones(8, 1))),
        ("empty", Bag(-torch.ones(8, 2).long(), torch.zeros(8, 2))),
    ]


# A small table has an array from row to place, a large one is searched.
@pytest.mark.parametrize("rows", [R, 5000])
@pytest.mark.parametrize("chunk", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_touched_rows_equal_dense_autograd(rows: int, chunk: int, dtype: torch.dtype) -> None:
    tables = {"t": torch.randn(rows, E).to(dtype), "empty": torch.randn(4, 3)}
    bags = make_bags(rows - 9)
    touched = TouchedRows(tables, bags)
    dense = tables["t"].float().requires_grad_()
    for name, bag in bags:
        found = [
            touched.lookup(name, Bag(ids, weights))
            for ids, weights in zip(bag.ids.split(chunk), bag.weights.split(chunk), strict=True)
        ]
        if name == "t":
            expected = pool(dense, bag.ids.clamp(min=0), bag.weights)
            torch.testing.assert_close(torch.cat(found), expected)
            (expected.sin() * 1.7).sum().backward()
        else:
            assert (torch.cat(found) == 0).all()
        for part in found:
            if part.requires_grad:
                (part.sin() * 1.7).sum().backward()
    gradients = touched.gradients(World())
    ids, grad = gradients["t"]
    assert dense.grad is not None
    assert 5 < len(ids) < rows
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, dense.grad[ids])
    untouched = torch.ones(rows, dtype=torch.bool)
    untouched[ids] = False
    assert (dense.grad[untouched] == 0).all()
    assert (grad != 0).any(1).all()
    assert len(gradients["empty"][0]) == 0


def test_what_is_kept_of_a_step_does_not_grow_with_the_table() -> None:
    bag = Bag(torch.tensor([[7], [2_999_999]]), torch.ones(2, 1))
    touched = TouchedRows({"t": torch.zeros(3_000_000, 1)}, [("t", bag)])
    touched.lookup("t", bag).sum().backward()
    kept = [t for part in vars(touched).values() for t in part.values()]
    assert sum(t.numel() for t in kept) < 10


def test_lazy_adam_equals_adam_where_every_row_is_touched() -> None:
    start = torch.randn(R, E)
    ours, theirs = {"t": start.clone()}, torch.nn.Parameter(start.clone())
    optimizer, reference = TableOptimizer(ours, "lazy_adam"), torch.optim.Adam([theirs], lr=0.03)
    for step in range(5):
        grad = torch.randn(R, E, generator=torch.Generator().manual_seed(step))
        optimizer.step({"t": (torch.arange(R), grad * 4)}, 0.03, scale=0.25)
        theirs.grad = grad
        reference.step()
    torch.testing.assert_close(ours["t"], theirs.data)
    assert (ours["t"] - start).abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lazy_adam", "rowwise_adagrad"])
def test_only_touched_rows_move_and_state_comes_back(kind, dtype: torch.dtype) -> None:
    tables = {"t": torch.randn(R, E).to(dtype)}
    before = tables["t"].clone()
    optimizer = TableOptimizer(tables, kind, seed=4)
    ids = torch.tensor([2, 5, 30])
    optimizer.step({"t": (ids, torch.randn(3, E))}, 0.1)
    moved = (tables["t"] != before).any(1)
    assert moved.nonzero().flatten().tolist() == ids.tolist()
    other = {"t": tables["t"].clone()}
    restored = TableOptimizer(other, kind, seed=4)
    restored.load_state_dict(optimizer.state_dict())
    assert all(t.dtype == torch.float32 for t in optimizer.state_dict()["state"].values())
    grad = torch.randn(3, E)
    optimizer.step({"t": (ids, grad)}, 0.1)
    restored.step({"t": (ids, grad)}, 0.1)
    assert torch.equal(tables["t"], other["t"])


@pytest.mark.parametrize("kind", ["lazy_adam", "rowwise_adagrad"])
def test_weight_decay_shrinks_touched_rows_before_their_update(kind) -> None:
    start, ids, grad = torch.randn(R, E), torch.tensor([2, 5, 30]), torch.randn(3, E)
    moved = {}
    for decay in (0.0, 0.4):
        moved[decay] = {"t": start.clone()}
        TableOptimizer(moved[decay], kind, 0, decay).step({"t": (ids, grad)}, 0.1)
    wanted = moved[0.0]["t"].clone()
    wanted[ids] -= 0.1 * 0.4 * start[ids]
    torch.testing.assert_close(moved[0.4]["t"], wanted)
    assert (moved[0.4]["t"] != moved[0.0]["t"]).any(1).nonzero().flatten().tolist() == ids.tolist()


def test_lazy_adam_with_decay_equals_adamw_where_every_row_is_touched() -> None:
    start = torch.randn(R, E)
    ours, theirs = {"t": start.clone()}, torch.nn.Parameter(start.clone())
    optimizer = TableOptimizer(ours, "lazy_adam", weight_decay=0.3)
    reference = torch.optim.AdamW([theirs], lr=0.03, weight_decay=0.3)
    for step in range(5):
        grad = torch.randn(R, E, generator=torch.Generator().manual_seed(step))
        optimizer.step({"t": (torch.arange(R), grad)}, 0.03)
        theirs.grad = grad
        reference.step()
    torch.testing.assert_close(ours["t"], theirs.data)


def test_rowwise_adagrad_by_hand() -> None:
    tables = {"t": torch.zeros(3, 2)}
    optimizer = TableOptimizer(tables, "rowwise_adagrad")
    for _ in range(2):
        optimizer.step({"t": (torch.tensor([1]), torch.tensor([[3.0, 1.0]]))}, 0.5)
    # The mean of squares is 5; the sums are 5 and 10.
    expected = -0.5 * 3 * (5**-0.5 + 10**-0.5)
    assert tables["t"][1, 0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_keeps_the_mean_and_what_fits(dtype: torch.dtype) -> None:
    keys = row_keys(1, 2, torch.arange(20_000), 0)
    # Signs, a binade's edges, zero, and a subnormal number of float16.
    values = torch.tensor([0.1, -0.1, 0.9999, 1.001, -4.003, 0.0, 3.3e-6, -100.7])
    rounded = round_stochastically(values.expand(20_000, -1), dtype, keys)
    assert rounded.dtype == dtype
    for column, value in zip(rounded.float().T, values, strict=True):
        found = column.unique()
        gap = found[-1] - found[0]
        assert len(found) <= 2
        assert found[0] <= value <= found[-1]
        assert (column.mean() - value).abs() <= 0.02 * gap
        if len(found) == 2:
            nearest = value.to(dtype)
            toward = torch.tensor(torch.inf if nearest < value else -torch.inf, dtype=dtype)
            neighbour = torch.nextafter(nearest, toward)
            assert sorted(found.tolist()) == sorted([float(nearest), float(neighbour)])
    assert (rounded[:, 0] != rounded[0, 0]).any()
    fits = torch.randn(500, E).to(dtype).float()
    assert torch.equal(round_stochastically(fits, dtype, keys[:500]).float(), fits)
    assert not round_stochastically(torch.tensor([[torch.inf, torch.nan]]), dtype, keys[:1]).isfinite().any()


def test_tiny_updates_move_a_bfloat16_row_as_they_move_a_float32_row() -> None:
    """Updates far below the distance of neighbouring values are all lost by rounding to the nearest."""
    start = torch.ones(40, 50) * 1.5
    exact, low = {"t": start.clone()}, {"t": start.bfloat16()}
    optimizers = [TableOptimizer(tables, "rowwise_adagrad", seed=3) for tables in (exact, low)]
    ids = torch.arange(40)
    for _ in range(300):
        for optimizer in optimizers:
            optimizer.step({"t": (ids, torch.ones(40, 50))}, 2e-3)
    moved = start - exact["t"]
    assert torch.finfo(torch.bfloat16).eps / 2 > 2e-3
    assert moved.min() > 0.05
    assert (start - low["t"].float()).mean().item() == pytest.approx(moved.mean().item(), rel=0.02)
    assert low["t"].unique().numel() > 3


def test_rounding_is_a_function_of_seed_step_row_and_column() -> None:
    """All ranks and a resumed run round alike, whatever other rows a step has."""

    def run(ids: list[int], seed: int = 0, before: int = 0) -> torch.Tensor:
        tables = {"t": torch.ones(R, E, dtype=torch.bfloat16)}
        optimizer = TableOptimizer(tables, "rowwise_adagrad", seed)
        for _ in range(before):
            optimizer.step({"t": (torch.tensor([0]), torch.ones(1, E))}, 0.0)
        optimizer.step({"t": (torch.tensor(ids), torch.ones(len(ids), E))}, 2e-3)
        return tables["t"]

    rows = list(range(1, R))
    whole = run(rows)
    assert torch.equal(run([3, 7, 20])[[3, 7, 20]], whole[[3, 7, 20]])
    assert 0.1 < (whole[1:] == 1).float().mean() < 0.9
    assert not torch.equal(run(rows, seed=1), whole)
    assert not torch.equal(run(rows, before=1), whole)
    assert len(whole[1:].unique(dim=0)) > 10

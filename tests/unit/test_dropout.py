"""Dropout masks depend on seed, step, global row and layer, and on nothing else."""

import pytest
import torch

from twotower.model.dropout import RowDropout, row_keys, uniform


def test_masks_do_not_depend_on_how_rows_are_cut_into_pieces() -> None:
    rows = torch.arange(37)
    whole = uniform(row_keys(3, 5, rows, 0), 19)
    pieces = torch.cat([uniform(row_keys(3, 5, part, 0), 19) for part in rows.split(8)])
    assert torch.equal(whole, pieces)
    assert whole.unique().numel() > 0.99 * whole.numel()


@pytest.mark.parametrize(
    "other",
    [
        lambda rows: uniform(row_keys(4, 5, rows, 0), 19),
        lambda rows: uniform(row_keys(3, 6, rows, 0), 19),
        lambda rows: uniform(row_keys(3, 5, rows + 1, 0), 19),
        lambda rows: uniform(row_keys(3, 5, rows, 1), 19),
        lambda rows: uniform(row_keys(3, 5, rows, 0), 19, stream=1),
    ],
    ids=["seed", "step", "row", "tower", "layer"],
)
def test_each_part_of_the_key_changes_the_mask(other) -> None:
    rows = torch.arange(200)
    first, second = uniform(row_keys(3, 5, rows, 0), 19), other(rows)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05


def test_numbers_are_uniform() -> None:
    numbers = uniform(row_keys(0, 0, torch.arange(4000), 0), 50).flatten()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1) / numbers.numel()
    assert (counts - 0.05).abs().max() < 0.003


def test_dropout_keeps_the_mean_and_is_off_without_keys_or_in_evaluation() -> None:
    layer, x = RowDropout(0.3, stream=1), torch.ones(500, 41)
    keys = row_keys(1, 2, torch.arange(500), 0)
    dropped = layer(x, keys)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(layer(x, None), x)
    assert torch.equal(layer.eval()(x, keys), x)


@pytest.mark.parametrize("bits", [13, 16, 24])
def test_numbers_have_the_bits_asked_for(bits: int) -> None:
    numbers = uniform(row_keys(0, 0, torch.arange(3000), 0), 7, bits=bits)
    steps = numbers.double() * 2**bits
    assert torch.equal(steps, steps.round())
    assert (steps % 2).mean().item() == pytest.approx(0.5, abs=0.02)
    assert numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)

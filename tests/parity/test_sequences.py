"""Sequence encoders: 1, 2 and 3 workers, and chunks of any size, give the same loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.workers import assert_close, run_world, step_results
from tests.sequences import ATTENTION, TRANSFORMER
from tests.streams import uneven_dataset, with_train
from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.model.batch import Sequences
from twotower.model.checkpoint import weights_of
from twotower.training.collectives import World
from twotower.training.loop import Trainer

NOTHING = "towers.query.encoders.of_history.nothing"
BATCH = 66  # divides by 1, 2 and 3
EVERYTHING: dict[str, Any] = {
    "loss": {"symmetric": True, "log_q": 0.7},
    "negatives": {
        "uniform": 10,
        "popular": 7,
        "explicit": 2,
        "memory": 90,
        "memory_start": 1,
        "mined": {"per_query": 3, "skip": 2, "window": 20},
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"tower_chunk_size": 13},
    "everything": EVERYTHING | {"tower_chunk_size": 8},
}


@pytest.fixture(scope="module", params=["transformer", "attention"])
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Config], Dataset]:
    """Users of up to 500 interactions, many at equal times, and a configuration for each variant."""
    history = {"transformer": TRANSFORMER, "attention": ATTENTION}[request.param] | {"item_dropout": 0.2}
    config, dataset = uneven_dataset(tmp_path_factory.mktemp("sequences"), history)
    common: dict[str, Any] = {"global_batch_size": BATCH, "num_workers": 1}
    return {name: with_train(config, **common, **more) for name, more in VARIANTS.items()}, dataset


@pytest.fixture(scope="module", params=[2, 3])
def ranks(
    request: pytest.FixtureRequest,
    prepared: tuple[dict[str, Config], Dataset],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, list[dict]]]:
    """Results of each variant, by rank."""
    configs, dataset = prepared
    out = tmp_path_factory.mktemp("world") / "out"
    found = run_world([*configs.values()], dataset, request.param, steps_of(prepared), out, update=False)
    return [dict(zip(VARIANTS, results, strict=True)) for results in found]


def trainer_of(prepared: tuple[dict[str, Config], Dataset], name: str) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(prepared[0][name], prepared[1], World(), "train")


def steps_of(prepared: tuple[dict[str, Config], Dataset]) -> list[int]:
    source = trainer_of(prepared, "plain").source
    assert source.rows_per_epoch % BATCH % 6, "the last batch must be uneven to test its padding"
    return [0, 1, source.steps_per_epoch - 1]


def assert_all_close(found: list[dict], expected: list[dict]) -> None:
    """Assert that the results of steps are the same up to rounding."""
    without = 0
    for mine, wanted in zip(found[:-1], expected[:-1], strict=True):
        if not wanted[NOTHING].any():
            # A batch in which every query knows something.
            assert not mine.pop(NOTHING).any()
            del wanted[NOTHING]
            without += 1
        assert_close(mine, wanted)
    assert without < len(found) - 1


@pytest.mark.parametrize("name", VARIANTS)
def test_same_loss_and_gradients_on_any_number_of_workers(
    name: str, prepared: tuple[dict[str, Config], Dataset], ranks: list[dict]
) -> None:
    expected = step_results(trainer_of(prepared, name), steps_of(prepared), update=False)
    assert any(".encoders.of_history." in key for key in expected[0])
    found = ranks[0][name]
    for other in ranks[1:]:
        for mine, theirs in zip(found, other[name], strict=True):
            assert all(torch.equal(mine[tensor], theirs[tensor]) for tensor in mine)
    assert_all_close(found, expected)


@pytest.mark.parametrize("chunk", [1, 7, 40, 1_000])
def test_same_loss_and_gradients_in_chunks(chunk: int, prepared: tuple[dict[str, Config], Dataset]) -> None:
    plain = trainer_of(prepared, "plain")
    values = with_train(prepared[0]["plain"], tower_chunk_size=chunk)
    chunked = Trainer(values, prepared[1], World(), "train")
    steps = steps_of(prepared)
    expected, found = (step_results(trainer, steps, update=False) for trainer in (plain, chunked))
    assert_all_close(found, expected)


def test_a_batch_has_windows_that_ranks_and_chunks_cut(
    prepared: tuple[dict[str, Config], Dataset],
) -> None:
    """Or the comparisons above would not be about much."""
    trainer = trainer_of(prepared, "plain")
    batch = trainer.assemble(next(trainer.source.shares(0)), 0)
    sequences = batch.queries.features["history"]
    assert isinstance(sequences, Sequences)
    read = sequences.read.numpy()
    assert (read < 0).any()
    stretch = np.where(read < 0, -1, sequences.stretch.flatten().numpy()[np.maximum(read, 0)])
    assert any(stretch[cut - 1] == stretch[cut] for cut in (22, 33, 44))
    assert any(stretch[cut - 1] == stretch[cut] for cut in (7, 14, 21, 28))
    assert len(set(stretch.tolist())) < 0.6 * BATCH


def test_a_run_that_went_on_ends_with_the_bits_of_one_that_did_not_stop(
    prepared: tuple[dict[str, Config], Dataset], tmp_path: Path
) -> None:
    whole = trainer_of(prepared, "everything")
    saved = tmp_path / "state.pt"

    def save(report: Any) -> None:
        if report.step == 5:
            torch.save((whole.state_dict(), weights_of(whole.model), whole.best_weights), saved)

    for _ in range(2):
        whole.run_epoch(save)
    second = trainer_of(prepared, "everything")
    second.load_state_dict(*torch.load(saved, weights_only=True))
    while second.epoch < 2:
        second.run_epoch()
    for name, tensor in weights_of(whole.model).items():
        assert torch.equal(tensor, weights_of(second.model)[name]), name
    assert whole.history[1].loss < whole.history[0].loss

"""Streams of real processes: together each example once, trained as by one process given their shares."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.apart import START
from tests.parity.workers import assert_close, step_results
from tests.sequences import TRANSFORMER
from tests.streams import keys, keys_of, uneven_dataset, with_train
from twotower.cluster.processes import free_port
from twotower.config import Config, parse_config
from twotower.data.blocks import read_blocks
from twotower.data.dataset import Dataset
from twotower.training.batches import MemorySource, Share
from twotower.training.collectives import World
from twotower.training.examples import Examples, TowerInputs
from twotower.training.loop import Trainer, memory_source
from twotower.training.stream import StreamSource
from twotower.training.weights import Factors

BATCH = 42
STEPS = [0, 3, 7]


def _stream(config: Config, dataset: Dataset, world: World, inputs: TowerInputs) -> StreamSource:
    read = partial(read_blocks, dataset.path / "interactions.parquet")
    return StreamSource(dataset, inputs, config, world, "train", read)


def _worker(rank: int, size: int, port: int, config: dict, dataset_path: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size)
    world, parsed = World.current(), parse_config(config)
    dataset = Dataset.open(dataset_path)
    trainer = Trainer(parsed, dataset, world, "train", partial(_stream, parsed, dataset, world))
    source = trainer.source
    assert isinstance(source, StreamSource)
    epochs = [list(source.shares(epoch)) for epoch in (0, 1)]
    resumed = list(source.shares(1, 5))
    found = {
        "keys": [keys_of(shares) for shares in [*epochs, resumed]],
        "rows": [
            [(share.item_rows, share.user_rows, share.user_counts, share.weights) for share in shares]
            for shares in [*epochs, resumed]
        ],
        "results": step_results(trainer, STEPS),
    }
    torch.save(found, Path(out) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["pooled", "transformer"])
def uneven(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Dataset]:
    history = TRANSFORMER if request.param == "transformer" else None
    config, dataset = uneven_dataset(tmp_path_factory.mktemp("uneven"), history)
    return (
        with_train(
            config,
            global_batch_size=BATCH,
            num_workers=1,
            stream_buffer_rows=200,
            negatives={"explicit": 2, "uniform": 6},
            # Times are 0 to 59 microseconds.
            loss={"symmetric": True, "recency_half_life_days": 20 / 86.4e9, "activity_power": 0.5},
        ),
        dataset,
    )


@pytest.fixture(scope="module")
def ranks(uneven: tuple[Config, Dataset], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("out")
    size = 3
    config, dataset = uneven
    arguments = (size, free_port(), config.to_json(), str(dataset.path), str(out))
    mp.start_processes(_worker, args=arguments, nprocs=size, start_method=START)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(size)]


def test_together_the_ranks_yield_an_epoch_once_in_as_many_shares(
    uneven: tuple[Config, Dataset], ranks: list[dict]
) -> None:
    examples = Examples.of(uneven[1], TowerInputs(uneven[1]), "train")
    everyone = np.sort(keys(examples, np.arange(len(examples))))
    for epoch in (0, 1):
        shares = [rank["keys"][epoch] for rank in ranks]
        assert {len(s) for s in shares} == {-(-len(examples) // BATCH)}
        assert (np.sort(np.concatenate([k for s in shares for k in s])) == everyone).all()
    assert [k.tolist() for k in ranks[0]["keys"][0]] != [k.tolist() for k in ranks[0]["keys"][1]]


def test_every_rank_knows_the_rows_of_all(uneven: tuple[Config, Dataset], ranks: list[dict]) -> None:
    factors = Factors.of(uneven[0].train.loss, uneven[1])
    examples = Examples.of(uneven[1], TowerInputs(uneven[1]), "train", factors=factors)
    of_key = {int(k): n for n, k in enumerate(keys(examples, np.arange(len(examples))))}
    assert len(np.unique(examples.weights(np.arange(len(examples))))) > 300
    for step in range(len(ranks[0]["rows"][0])):
        for rank in ranks[1:]:
            for mine, theirs in zip(ranks[0]["rows"][0][step], rank["rows"][0][step], strict=True):
                assert (mine == theirs).all()
        items, users, counts, weights = ranks[0]["rows"][0][step]
        for number, rank in enumerate(ranks):
            rows = np.array([of_key[int(k)] for k in rank["keys"][0][step]], np.int64)
            there = items[number] >= 0
            assert (items[number][there] == examples.item_rows(rows)).all()
            assert (users[number][there] == examples.user_rows(rows)).all()
            assert (counts[number][there] == examples.user_counts(rows)).all()
            assert (weights[number][there] == examples.weights(rows)).all()
            assert (weights[number][~there] == 0).all()
            assert (users[number][~there] == -1).all()


def test_a_restart_in_the_middle_yields_what_remains(ranks: list[dict]) -> None:
    for rank in ranks:
        _, whole, resumed = rank["keys"]
        assert [k.tolist() for k in resumed] == [k.tolist() for k in whole[5:]]
        for mine, theirs in zip(rank["rows"][2], rank["rows"][1][5:], strict=True):
            assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))


class _Recorded(MemorySource):
    """The shares of other ranks, as the shares of one process that has all examples in memory."""

    recorded: list[np.ndarray]

    def shares(self, epoch: int, first_step: int = 0) -> Iterator[Share]:
        examples = self.examples
        of_key = {int(k): n for n, k in enumerate(keys(examples, np.arange(len(examples))))}
        for step in range(first_step, len(self.recorded)):
            rows = np.array([of_key[int(k)] for k in self.recorded[step]], np.int64)
            yield Share(
                examples,
                rows,
                examples.item_rows(rows)[None],
                examples.user_rows(rows)[None],
                examples.user_counts(rows)[None],
                examples.weights(rows)[None],
            )


def test_streaming_ranks_give_the_loss_and_gradients_of_one_process(
    uneven: tuple[Config, Dataset], ranks: list[dict]
) -> None:
    config, dataset = uneven

    def recorded(inputs: TowerInputs) -> MemorySource:
        plain = memory_source(config, dataset, inputs, World(), "train")
        source = _Recorded(plain.examples, dataset.interactions, BATCH, World(), config.seed)
        source.recorded = [np.concatenate(step) for step in zip(*(r["keys"][0] for r in ranks), strict=True)]
        return source

    torch.set_num_threads(1)
    expected = step_results(Trainer(config, dataset, World(), "train", recorded), STEPS)
    assert_close(ranks[0]["results"][0], expected[0])
    # Later steps start from weights that differ by rounding, which Adam's division can enlarge.
    for found, wanted in zip(ranks[0]["results"][1:-1], expected[1:-1], strict=True):
        assert_close(found, wanted, relative=1e-3)
    for rank in ranks[1:]:
        for mine, theirs in zip(ranks[0]["results"], rank["results"], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)

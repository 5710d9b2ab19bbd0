"""Interactions streamed through Ray Data by real training workers, and when that is chosen."""

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from tests.streams import keys, keys_of, rows_of, uneven_dataset, with_train
from twotower.cluster import ingest
from twotower.cluster.ingest import block_reader, choose_ingest, make_source
from twotower.config import Config, parse_config
from twotower.data.blocks import BlockIndex, read_blocks
from twotower.data.dataset import Dataset
from twotower.data.interactions import Interactions
from twotower.pipeline.ingest import BYTES_PER_INTERACTION
from twotower.schema import SPLITS
from twotower.training.collectives import World
from twotower.training.examples import Examples, TowerInputs, fitted_part
from twotower.training.loop import Trainer
from twotower.training.stream import StreamSource

BATCH = 42


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset]:
    config, dataset = uneven_dataset(tmp_path_factory.mktemp("uneven"))
    config = with_train(config, global_batch_size=BATCH, num_workers=2, stream_buffer_rows=200)
    return config, dataset


def _worker(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    config, dataset = parse_config(settings["config"]), Dataset.open(settings["dataset"])
    world = World.current()
    pipelines = 0
    plain = ray.data.from_items

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal pipelines
        pipelines += 1
        return plain(*args, **named)

    ray.data.from_items = counted
    try:
        trainer = Trainer(
            config, dataset, world, "train", make_source(config, dataset, world, "train", "stream")
        )
        source = trainer.source
        assert isinstance(source, StreamSource)
        whole = keys_of(source.shares(1))
        # A pipeline that is given up in the middle stops, and the next one begins where it is told to.
        started = source.shares(1)
        next(started)
        del started
        resumed = keys_of(source.shares(1, 5))
        losses = [trainer.run_epoch().loss for _ in range(2)]
    finally:
        ray.data.from_items = plain
    found = {"keys": [whole, resumed], "pipelines": pipelines, "losses": losses}
    torch.save(found, Path(settings["out"]) / f"{world.rank}.pt")


@pytest.fixture(scope="module")
def ranks(
    ray_local: None, uneven: tuple[Config, Dataset], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    config, dataset = uneven
    assert ray.cluster_resources()["CPU"] == 4, "the workers must have all CPUs"
    TorchTrainer(
        _worker,
        train_loop_config={"config": config.to_json(), "dataset": str(dataset.path), "out": str(out)},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 2}),
        run_config=RunConfig(
            name="stream",
            storage_path=str(out / "ray"),
            worker_runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}},
        ),
    ).fit()
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_workers_that_hold_all_cpus_stream_every_example_once(
    ranks: list[dict[str, Any]], uneven: tuple[Config, Dataset]
) -> None:
    examples = Examples.of(uneven[1], TowerInputs(uneven[1]), "train")
    everyone = np.sort(keys(examples, np.arange(len(examples))))
    shares = [rank["keys"][0] for rank in ranks]
    assert {len(s) for s in shares} == {-(-len(examples) // BATCH)}
    assert (np.sort(np.concatenate([k for s in shares for k in s])) == everyone).all()
    assert [rank["pipelines"] for rank in ranks] == [5, 5]  # one epoch, two starts in another, two trained


def test_the_order_through_ray_data_is_that_of_plain_reading(
    ranks: list[dict[str, Any]], uneven: tuple[Config, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.training.stream.dist.new_group", lambda backend: None)
    config, dataset = uneven
    path = dataset.path / "interactions.parquet"
    for number, rank in enumerate(ranks):
        source = StreamSource(
            dataset,
            TowerInputs(dataset),
            config,
            World(number, 2),
            "train",
            lambda blocks: read_blocks(path, blocks),
        )
        whole = [k.tolist() for k in keys_of(source.shares(1))]
        assert [k.tolist() for k in rank["keys"][0]] == whole
        assert [k.tolist() for k in rank["keys"][1]] == whole[5:]


def test_a_streamed_training_learns(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert ranks[0]["losses"][1] < ranks[0]["losses"][0]


def test_ray_data_reads_blocks_in_the_order_given(ray_local: None, uneven: tuple[Config, Dataset]) -> None:
    path = uneven[1].path / "interactions.parquet"
    blocks = BlockIndex.scan(path, 30, uneven[1].num_catalogue_items, SPLITS["test"]).blocks
    some = [blocks[n] for n in (7, 2, len(blocks) - 1, 0, 3)]
    for found, expected in zip(block_reader(path)(some), read_blocks(path, some), strict=True):
        assert (rows_of(found) == rows_of(expected)).all()


def test_the_choice_follows_the_memory_of_a_node(
    uneven: tuple[Config, Dataset], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, dataset = uneven
    each = int(dataset.counts["interactions"]) * BYTES_PER_INTERACTION
    monkeypatch.setattr(ingest, "wants_gpu", lambda config: False)

    def chosen(memory: float, cpus: float = 8.0, **train: object) -> str:
        small = {"Alive": True, "Resources": {"CPU": cpus, "memory": memory}}
        large = {"Alive": True, "Resources": {"CPU": cpus, "memory": 1e12}}
        gone = {"Alive": False, "Resources": {}}
        head = {"Alive": True, "Resources": {"memory": 1.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [large, small, gone, head])
        return choose_ingest(with_train(config, **train), dataset)

    assert chosen(4 * each) == "memory"  # two workers on a node may take half of it
    assert chosen(4 * each - 10) == "stream"
    assert chosen(2 * each, cpus=1.0) == "memory"  # there is room for one worker
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["memory", "stream", "memory"]
    assert "in the memory of 2 workers take" in lines[1]
    assert chosen(1.0, ingest="memory") == "memory"
    assert chosen(1e15, ingest="stream") == "stream"
    assert capsys.readouterr().err == ""
    assert chosen(1.0, negatives={"mined": {"per_query": 2}}) == "memory"
    assert "mining hard negatives" in capsys.readouterr().err


@pytest.mark.parametrize("length", [0, 50])
@pytest.mark.parametrize("explicit", [False, True])
def test_the_estimate_of_memory_is_what_examples_take(
    rng: np.random.Generator, explicit: bool, length: int
) -> None:
    n, users = 200_000, 4_000
    schema = SimpleNamespace(sequence_length=length)
    inputs = SimpleNamespace(
        num_catalogue_items=500, num_items=500, has_times=True, order="times", schema=schema
    )
    tracemalloc.start()
    interactions = Interactions.of(
        users,
        user_row=np.sort(rng.integers(0, users, n)).astype(np.int32),
        item_row=rng.integers(0, 500, n).astype(np.int32),
        time=np.zeros(n, np.int64),
        weight=np.ones(n, np.float32),
        kind=(rng.random(n) < 0.1).astype(np.int8),
        split=(rng.random(n) < 0.2).astype(np.int8),
    )
    tracemalloc.reset_peak()
    examples = Examples(inputs, fitted_part(interactions, "train"), None, explicit)  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(examples) > n / 2
    assert 0.5 * BYTES_PER_INTERACTION < peak / n < 1.1 * BYTES_PER_INTERACTION

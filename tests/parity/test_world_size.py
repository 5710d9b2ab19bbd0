"""Workers share a global batch: 1, 2 and 3 of them give the same loss and gradients."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.workers import assert_close, run_world, step_results
from tests.streams import with_train
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.training.collectives import World
from twotower.training.loop import Trainer

BATCH = 174  # divides by 1, 2 and 3

OWN = {"uniform": 10, "memory": 150, "memory_start": 1, "explicit": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"tower_chunk_size": 23},
    "mixed": {"negatives": {"uniform": 31, "popular": 17, "memory": 200, "memory_start": 1}},
    "explicit and symmetric": {"negatives": {"explicit": 3}, "loss": {"symmetric": True}},
    "everything": {
        "tower_chunk_size": 40,
        "loss": {"symmetric": True, "log_q": 0.7},
        "optimizer": {"max_grad_norm": 0.5, "table_kind": "rowwise_adagrad"},
        "negatives": {
            "uniform": 10,
            "popular": 7,
            "memory": 150,
            "memory_start": 1,
            "explicit": 2,
            "mined": {"per_query": 3, "skip": 4, "window": 30},
        },
    },
    "batch norm": {},
    "without weights": {"loss": {"weights": "none"}},
    "bilateral": {
        "tower_chunk_size": 31,
        "loss": {
            "kind": "bsl",
            "learn_temperature": False,
            "recency_half_life_days": 200.0,
            "bsl": {"positive_temperature": 0.7, "negative_power": 1.22},
        },
        "negatives": OWN,
    },
    "binary": {
        "loss": {"kind": "bce", "log_q": 0.7, "activity_power": 0.5, "bce": {"offset": -1.0}},
        "negatives": OWN,
    },
    "top k": {
        "loss": {"kind": "slatk", "temperature": 0.07, "slatk": {"k": 15, "width": 0.3}},
        "negatives": OWN,
    },
}


def variant(small_config: Config, name: str) -> Config:
    values = copy.deepcopy(small_config.to_json())
    values["train"] |= {"global_batch_size": BATCH, "num_workers": 1} | VARIANTS[name]
    values["model"]["query_tower"]["dropout"] = 0.3
    values["model"]["item_tower"] |= {"dropout": 0.2, "input_dropout": 0.1}
    if name == "batch norm":
        values["model"]["query_tower"]["norm"] = values["model"]["item_tower"]["norm"] = "batch"
    values["features"]["item"][0]["unknown_rate"] = 0.2
    return parse_config(values)


@pytest.fixture(scope="module")
def dataset(small_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(events(small_config, tmp_path_factory.mktemp("events")))


def events(small_config: Config, folder: Path, **feature: Any) -> Config:
    """Events of 240 users: three of four are positive, of two weights, the others are explicit negatives."""
    rng = np.random.default_rng(8)
    count = 5_000
    items = [f"{i},g{i % 5}|g{i % 7},word{i % 11}" for i in range(180)]
    (folder / "items.csv").write_text("item_id,genres,title\n" + "\n".join(items))
    rows = zip(
        rng.integers(0, 240, count),
        np.minimum(rng.exponential(30, count).astype(int), 179),
        rng.integers(1_600_000_000, 1_700_000_000, count),
        rng.choice(["buy", "view", "view", "skip"], count),
        strict=True,
    )
    text = "\n".join(",".join(map(str, row)) for row in rows)
    (folder / "events.csv").write_text("user_id,item_id,timestamp,event\n" + text)
    values = copy.deepcopy(small_config.to_json())
    values["storage"]["root"] = str(folder / "root")
    values["data"]["source"] = {
        "kind": "files",
        "interactions": str(folder / "events.csv"),
        "columns": {"time": "timestamp", "event": "event", "time_unit": "s"},
        "events": {"buy": 1.0, "view": 0.3, "skip": "negative"},
        "items": {"path": str(folder / "items.csv"), "id": "item_id"},
    }
    for side in ("query", "item"):
        values["features"][side][0] |= feature
    for history in (f for f in values["features"]["query"] if f["type"] == "history"):
        history["item_dropout"] = 0.3
    return parse_config(values)


@pytest.fixture(scope="module")
def steps(small_config: Config, dataset: Dataset) -> list[int]:
    source = Trainer(variant(small_config, "plain"), dataset, World(), "train").source
    last = source.steps_per_epoch - 1
    rest = source.rows_per_epoch - last * BATCH
    assert rest % 2 or rest % 3, "the last batch must be uneven to test its padding"
    return [0, 1, last]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(
    request: pytest.FixtureRequest,
    small_config: Config,
    dataset: Dataset,
    steps: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, list[dict]]]:
    """Results of each variant, by rank."""
    out = tmp_path_factory.mktemp("world") / "out"
    configs = [variant(small_config, name) for name in VARIANTS]
    found = run_world(configs, dataset, request.param, steps, out, update=False)
    return [dict(zip(VARIANTS, results, strict=True)) for results in found]


@pytest.mark.parametrize("name", VARIANTS)
def test_same_loss_and_gradients(
    name: str, ranks: list[dict], small_config: Config, dataset: Dataset, steps: list[int]
) -> None:
    torch.set_num_threads(1)
    expected = step_results(
        Trainer(variant(small_config, name), dataset, World(), "train"), steps, update=False
    )
    found = ranks[0][name]
    for other in ranks[1:]:
        for mine, theirs in zip(found, other[name], strict=True):
            assert mine.keys() == theirs.keys()
            for tensor in mine:
                assert torch.equal(mine[tensor], theirs[tensor]), f"{tensor} differs between ranks"
    for mine, wanted in zip(found[:-1], expected[:-1], strict=True):
        if name == "batch norm":
            # What is added before it cancels: the true gradient is zero, and rounding is all that is left.
            for side in ("query", "item"):
                bias = f"towers.{side}.layers.0.bias"
                weight = wanted[f"towers.{side}.layers.0.weight"].norm()
                assert max(wanted.pop(bias).norm(), mine.pop(bias).norm()) < 1e-5 * weight
        assert_close(mine, wanted)


def test_gradients_are_reduced_once_a_step_in_chunks_too(ranks: list[dict], steps: list[int]) -> None:
    """A reduction for each chunk would hang where ranks have different numbers of them."""
    for results in ranks:
        for name in set(VARIANTS) - {"batch norm"}:
            assert results[name][-1]["reductions"] == len(steps), name
        assert results["batch norm"][-1]["reductions"] > len(steps)


def test_replicas_are_the_same_bits_after_100_steps(
    small_config: Config, dataset: Dataset, tmp_path: Path
) -> None:
    """Tables and temperature are updated by every rank for itself."""
    values = copy.deepcopy(small_config.to_json())
    values["train"] |= {"global_batch_size": 60, "num_workers": 1}
    config = parse_config(values)
    steps = [step % 30 for step in range(100)]
    ranks = [results[0] for results in run_world([config], dataset, 3, steps, tmp_path / "out")]
    before = Trainer(config, dataset, World(), "train").model.state_dict()
    assert ranks[0][-1].pop("reductions") == len(steps)
    for name, tensor in ranks[0][-1].items():
        assert not torch.equal(tensor, before[name.removeprefix("weights.")]), f"{name} has not moved"
        for other in ranks[1:]:
            assert torch.equal(tensor, other[-1][name]), f"{name} differs between ranks"


def test_rows_that_only_padding_reads_stay(small_config: Config, steps: list[int], tmp_path: Path) -> None:
    """A row that is read is updated even where its gradient is zero: it decays, and moments move it."""
    known = events(small_config, tmp_path, unknown_rate=0.0)
    dataset = prepare(known)
    optimizer = {"table_kind": "rowwise_adagrad", "table_weight_decay": 30.0}
    config = with_train(known, global_batch_size=BATCH, num_workers=1, optimizer=optimizer)
    rest = Trainer(config, dataset, World(), "train").source.rows_per_epoch - steps[-1] * BATCH
    size = 3 if rest % 3 else 2
    ranks = [results[0] for results in run_world([config], dataset, size, steps[-1:], tmp_path / "out")]
    alone = Trainer(config, dataset, World(), "train")
    before = alone.model.tables["id_of_user"].clone()
    expected = step_results(alone, steps[-1:])[-1]
    found = ranks[0][-1]
    assert torch.equal(expected["weights.tables.id_of_user"][0], before[0]), "the unknown user is read"
    for name in expected:
        if name.startswith("weights.tables."):
            assert_close({name: found[name]}, {name: expected[name]}, relative=1e-4)


def test_local_negatives_alone_would_be_noticed(small_config: Config, dataset: Dataset) -> None:
    """A rank that only saw its own candidates would have another loss: the comparison above has force."""
    values = copy.deepcopy(small_config.to_json())
    values["train"] |= {"global_batch_size": BATCH, "num_workers": 1}
    whole = Trainer(parse_config(values), dataset, World(), "train")
    loss = step_results(whole, [0], update=False)[0]["loss"]
    values["train"]["global_batch_size"] = BATCH // 2
    half = Trainer(parse_config(values), dataset, World(), "train")
    halves = torch.stack([r["loss"] for r in step_results(half, [0, 1], update=False)[:-1]])
    assert abs(halves.mean() - loss) > 0.05 * loss

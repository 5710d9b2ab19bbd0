"""Every key of ``train`` and ``model`` changes what a training comes to, or is listed as one that must not.

A case is another value of a key, with settings beside it that give it something to do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from tests.datasets import files_config, grid, write_csv
from twotower.config import Config, parse_config
from twotower.config.model import ModelConfig
from twotower.config.section import Section
from twotower.config.training import TrainConfig
from twotower.data.blocks import read_blocks
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.model.checkpoint import weights_of
from twotower.training import loop
from twotower.training.collectives import World
from twotower.training.examples import TowerInputs
from twotower.training.loop import Trainer
from twotower.training.stream import StreamSource

Settings = dict[str, Any]
MINED: Settings = {
    "train.epochs": 3,
    "train.negatives.mined.per_query": 2,
    "train.negatives.mined.skip": 8,
    "train.negatives.mined.window": 20,
    "train.negatives.mined.margin": 0.0,
}
MEMORY: Settings = {"train.negatives.memory": 60, "train.negatives.memory_start": 0}
STREAM: Settings = {"train.ingest": "stream", "train.stream_buffer_rows": 100}
# A temperature that falls.
HOT: Settings = {"train.epochs": 4, "train.loss.temperature": 5.0, "train.optimizer.learning_rate": 0.03}
FIXED: Settings = {"train.loss.learn_temperature": False}
BSL: Settings = FIXED | {"train.loss.kind": "bsl"}
BCE: Settings = {"train.loss.kind": "bce"}
SLATK: Settings = {"train.loss.kind": "slatk"}
# Key, another value, and what stands beside it both times.
CASES: list[tuple[str, Any, Settings]] = [
    ("train.epochs", 3, {}),
    ("train.global_batch_size", 30, {}),
    ("train.ingest", "stream", {}),
    ("train.stream_buffer_rows", 40, STREAM),
    ("train.precision", "bfloat16", {}),
    ("train.loss.kind", "bce", {}),
    ("train.loss.bsl.positive_temperature", 3.0, BSL),
    ("train.loss.bsl.negative_power", 1.4, BSL),
    ("train.loss.bce.calibration", 0.2, BCE),
    ("train.loss.bce.offset", -2.0, BCE),
    ("train.loss.slatk.k", 5, SLATK),
    ("train.loss.slatk.width", 0.1, SLATK),
    ("train.loss.temperature", 0.2, {}),
    ("train.loss.learn_temperature", False, {}),
    ("train.loss.min_temperature", 4.9, HOT),
    ("train.loss.temperature_learning_rate", 0.1, {}),
    ("train.loss.final_temperature", 0.3, FIXED),
    ("train.loss.log_q", 0.5, {}),
    ("train.loss.mask_accidental_hits", False, {"train.loss.mask_known_positives": False}),
    ("train.loss.mask_known_positives", False, {}),
    ("train.loss.weights", "none", {}),
    ("train.loss.recency_half_life_days", 0.1, {}),
    ("train.loss.activity_power", 0.5, {}),
    ("train.loss.symmetric", True, {}),
    ("train.negatives.uniform", 9, {}),
    ("train.negatives.popular", 9, {}),
    ("train.negatives.memory", 60, {"train.negatives.memory_start": 0}),
    ("train.negatives.memory_start", 4, MEMORY),
    ("train.negatives.explicit", 2, {}),
    ("train.negatives.mined.per_query", 3, MINED),
    ("train.negatives.mined.start_epoch", 3, MINED),
    ("train.negatives.mined.every_epochs", 2, MINED),
    ("train.negatives.mined.every_steps", 2, MINED),
    ("train.negatives.mined.skip", 12, MINED),
    ("train.negatives.mined.window", 12, MINED),
    ("train.negatives.mined.margin", 0.6, MINED),
    ("train.negatives.own_weight", 9.0, {"train.negatives.explicit": 2}),
    ("train.optimizer.learning_rate", 0.01, {}),
    ("train.optimizer.weight_decay", 0.1, {}),
    ("train.optimizer.table_kind", "rowwise_adagrad", {}),
    ("train.optimizer.table_learning_rate", 0.01, {}),
    ("train.optimizer.table_weight_decay", 0.5, {}),
    ("train.optimizer.schedule", "linear", {}),
    ("train.optimizer.warmup_share", 0.5, {}),
    ("train.optimizer.max_grad_norm", 0.1, {}),
    ("train.validation.k", 30, {}),
    ("train.validation.max_users", 7, {}),
    ("train.early_stopping.patience", 1, {"train.early_stopping.min_delta": 1.0, "train.epochs": 3}),
    ("train.early_stopping.min_delta", 1.0, {"train.early_stopping.patience": 1, "train.epochs": 3}),
    ("model.embedding_dim", 13, {}),
    ("model.init_std", 0.1, {}),
    ("model.normalize", False, {}),
    ("model.item_bias", True, {}),
    ("model.table_dtype", "bfloat16", {}),
    *(
        (f"model.{side}_tower.{key}", value, {})
        for side in ("query", "item")
        for key, value in {
            "hidden": [9],
            "activation": "tanh",
            "norm": "none",
            "dropout": 0.4,
            "input_dropout": 0.3,
            "residual": "linear",
        }.items()
    ),
]
NO_MATTER = {
    "train.num_workers": "the same for any number: tests/parity",
    "train.tower_chunk_size": "the same in chunks of any size: tests/parity",
    "train.threads_per_worker": "speed alone",
    "train.compile": "speed alone",
    "train.fit": "what is published, chosen by the caller of a trainer: tests/cluster",
    "train.init_from": "read by the worker: tests/cluster",
    "train.checkpoint_every_steps": "what is written meanwhile: tests/cluster",
    "train.max_failures": "how often a lost worker is replaced: tests/cluster",
    "train.metrics.every_steps": "what is written: test_journal",
    "train.metrics.tensorboard": "what is written: test_journal",
    "train.metrics.mlflow": "what is written: test_journal",
    "train.negatives.unchosen": "of items without an example: test_training_loop",
    "train.validation.metric": "which epoch is the best one: below",
}


def keys(section: type[Section], prefix: str) -> Iterator[str]:
    """Yield the dotted keys of a section."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


def test_every_key_is_a_case_or_does_not_matter() -> None:
    everything = [*keys(TrainConfig, "train"), *keys(ModelConfig, "model")]
    named = [key for key, _, _ in CASES] + list(NO_MATTER)
    assert sorted(named) == sorted(everything)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Dataset]:
    """Twenty users, purchases and views of different weights, and negatives."""
    folder = tmp_path_factory.mktemp("settings")
    events = ("buy", "view", "skip", "view")
    rows = [[*row, events[n % 4]] for n, row in enumerate(grid(20, 17, 40))]
    names = {"user": "who", "item": "what", "time": "when", "time_unit": "s", "event": "event"}
    config = files_config(
        folder,
        write_csv(folder / "log.csv", ["who", "what", "when", "event"], rows),
        data__source__columns=names,
        data__source__events={"buy": 1.0, "view": 0.25, "skip": "negative"},
        features__query=[
            {"name": "history", "type": "history", "dim": 8, "pooling": "mean", "item_dropout": 0.0}
        ],
        features__item=[{"name": "item_id", "type": "id", "dim": 8}],
        model__embedding_dim=8,
        model__query_tower={"norm": "layer", "dropout": 0.1, "residual": "none"},
        model__item_tower={"norm": "layer", "dropout": 0.1, "residual": "none"},
        train__loss={"temperature": 0.07, "learn_temperature": True},
        train__epochs=2,
        train__global_batch_size=36,
        train__num_workers=1,
        train__validation={"k": 10},
    )
    return config, prepare(config)


def changed(config: Config, settings: Settings) -> Config:
    values = copy.deepcopy(config.to_json())
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = values
        for part in parents:
            node = node[part]
        node[last] = value
    return parse_config(values)


def outcome(prepared: tuple[Config, Dataset], settings: Settings) -> dict[str, Any]:
    """Return the weights after a training and what its epochs reported."""
    dataset = prepared[1]
    config = changed(prepared[0], settings)

    def streamed(inputs: TowerInputs) -> StreamSource:
        read = partial(read_blocks, dataset.path / "interactions.parquet")
        return StreamSource(dataset, inputs, config, World(), "train", read)

    stream = config.train.ingest == "stream"
    trainer = Trainer(config, dataset, World(), "train", streamed if stream else None)
    while trainer.epoch < config.train.epochs and not trainer.finished:
        trainer.run_epoch()
    reports = [(r.loss, r.temperature, r.validation_recall, r.validation_ndcg) for r in trainer.history]
    return {"reports": reports} | weights_of(trainer.model)


@pytest.fixture(scope="module")
def before(prepared: tuple[Config, Dataset]) -> dict[str, dict[str, Any]]:
    """Outcomes by the settings beside a case, computed when first asked for."""
    return {}


@pytest.mark.parametrize(("key", "value", "beside"), CASES, ids=[key for key, _, _ in CASES])
def test_another_value_comes_to_something_else(
    key: str, value: Any, beside: Settings, prepared: tuple[Config, Dataset], before: dict[str, Any]
) -> None:
    name = json.dumps(beside, sort_keys=True)
    if name not in before:
        before[name] = outcome(prepared, beside)
    plain, other = before[name], outcome(prepared, beside | {key: value})
    tensors = [k for k in plain if k != "reports"]
    same = plain["reports"] == other["reports"] and plain.keys() == other.keys()
    assert not same or not all(torch.equal(plain[k], other[k]) for k in tensors)


def test_the_same_settings_come_to_the_same(prepared: tuple[Config, Dataset]) -> None:
    """Or the comparisons above would hold of anything."""
    one, again = (outcome(prepared, MEMORY | {"train.loss.symmetric": True}) for _ in range(2))
    assert one.pop("reports") == again.pop("reports")
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("metric", "best"), [("recall", 2), ("ndcg", 1)])
def test_the_metric_picks_the_best_epoch(
    metric: str, best: int, prepared: tuple[Config, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([{"recall@10": 0.1, "ndcg@10": 0.9}, {"recall@10": 0.2, "ndcg@10": 0.8}])
    monkeypatch.setattr(loop, "validate", lambda *_: next(found))
    config = changed(prepared[0], {"train.validation.metric": metric})
    trainer = Trainer(config, prepared[1], World(), "train")
    trainer.run_epoch()
    trainer.run_epoch()
    assert trainer.best_epoch == best


def test_a_temperature_that_is_not_learned_counts_in_no_norm(prepared: tuple[Config, Dataset]) -> None:
    norms = []
    for learned in (True, False):
        config = changed(prepared[0], {"train.loss.learn_temperature": learned})
        trainer = Trainer(config, prepared[1], World(), "train")
        gradients = trainer.compute.gradients(trainer.assemble(next(trainer.source.shares(0)), 0))
        norms.append(trainer.optimizers.gradient_norm(gradients))
    assert trainer.model.log_temperature.grad is not None
    squared = norms[1] ** 2 + trainer.model.log_temperature.grad.item() ** 2
    assert norms[0] ** 2 == pytest.approx(squared, rel=1e-5)
    assert norms[0] > norms[1]

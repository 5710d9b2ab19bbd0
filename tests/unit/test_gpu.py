"""Training on a GPU against the same on the CPU."""

import copy

import pytest
import torch

from tests.parity.workers import assert_close, step_results
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.training.collectives import World
from twotower.training.loop import Trainer

pytestmark = pytest.mark.gpu


def on(device: str, config: Config, dataset: Dataset, **train: object) -> Trainer:
    values = copy.deepcopy(config.to_json())
    values["train"] |= {"precision": "float32"} | train
    return Trainer(parse_config(values), dataset, World(device=torch.device(device)), "train")


def test_a_step_gives_the_gradients_of_the_cpu(small_config: Config, small_dataset: Dataset) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    train = {"negatives": {"uniform": 20, "memory": 60, "memory_start": 0}, "tower_chunk_size": 100}
    found = step_results(on("cuda", small_config, small_dataset, **train), [0, 1], update=False)
    wanted = step_results(on("cpu", small_config, small_dataset, **train), [0, 1], update=False)
    for mine, theirs in zip(found[:-1], wanted[:-1], strict=True):
        assert_close({n: t.cpu() for n, t in mine.items()}, theirs, relative=1e-4)


@pytest.mark.parametrize("train", [{"precision": "bfloat16"}, {"compile": True}, {"precision": "auto"}])
def test_lower_precision_and_compiled_towers_learn_the_same(
    train: dict, small_config: Config, small_dataset: Dataset
) -> None:
    plain = on("cpu", small_config, small_dataset)
    other = on("cuda", small_config, small_dataset, **train)
    for _ in range(2):
        one, two = plain.run_epoch(), other.run_epoch()
        assert two.loss == pytest.approx(one.loss, rel=0.01)
    assert one.validation_recall is not None
    assert two.validation_recall == pytest.approx(one.validation_recall, abs=0.03)

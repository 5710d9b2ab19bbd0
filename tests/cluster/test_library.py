"""The library in one process and on Ray: the same artefacts, since both run the same steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch

import twotower as tt
from twotower.artefacts import read_manifest
from twotower.config import parse_config
from twotower.data.dataset import Dataset
from twotower.generations.generation import Generation

ADDRESSES = (None, "auto")


@pytest.fixture(scope="module")
def both(
    ray_local: None,
    small_values: Callable[..., dict[str, Any]],
    small_dataset: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[tt.Config, tt.Checkpoints]]:
    """Configuration and checkpoints of this process, and those of Ray."""
    few = {"train.epochs": 1, "evaluation.baselines": ["popularity"]}
    trained = []
    for address in ADDRESSES:
        root = tmp_path_factory.mktemp(address or "here")
        config = tt.configure(few, base=parse_config(small_values(root)))
        trained.append((config, tt.train(config, small_dataset, address=address)))
    return trained


def test_one_process_and_one_worker_of_ray_train_the_same(
    both: list[tuple[tt.Config, tt.Checkpoints]],
) -> None:
    here, there = (checkpoints.served for _, checkpoints in both)
    assert here.name == there.name
    weights = [safetensors.torch.load_file(path / "model.safetensors") for path in (here, there)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(tensor.numpy(), weights[1][name].numpy(), atol=1e-6, err_msg=name)
    manifests = [read_manifest(path, "checkpoint") for path in (here, there)]
    assert manifests[0].keys() == manifests[1].keys()
    for first, second in zip(*(m["history"] for m in manifests), strict=True):
        assert first | {"seconds": 0} == pytest.approx(second | {"seconds": 0}, abs=1e-6)


def test_one_process_and_ray_build_and_measure_the_same(
    both: list[tuple[tt.Config, tt.Checkpoints]], small_dataset: Dataset
) -> None:
    generations, reports = [], []
    for address, (config, checkpoints) in zip(ADDRESSES, both, strict=True):
        built = tt.build(config, small_dataset, checkpoints, address=address)
        generations.append(Generation.open(built, verify=True))
        reports.append(tt.evaluate(config, small_dataset, checkpoints, address=address))
    found, wanted = generations
    assert found.id == wanted.id
    assert set(found.manifest["files"]) == set(wanted.manifest["files"])
    rows = np.arange(small_dataset.num_catalogue_items)
    np.testing.assert_allclose(found.searcher().vectors(rows), wanted.searcher().vectors(rows), atol=1e-6)
    assert reports[0].by_ranker.keys() == reports[1].by_ranker.keys()
    for ranker, metrics in reports[0].by_ranker.items():
        assert metrics == pytest.approx(reports[1].by_ranker[ranker], abs=2e-3, rel=2e-3)

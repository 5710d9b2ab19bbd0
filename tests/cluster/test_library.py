"""The library in one process and on Ray: the same artefacts, since both run the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

import twotower as tt
from twotower.artefacts import read_manifest
from twotower.config import parse_config
from twotower.data.dataset import Dataset
from twotower.model.checkpoint import Checkpoint
from twotower.retrieval.generation import Generation


def test_one_process_and_one_worker_of_ray_write_the_same(
    ray_local: None, small_values: Callable[..., dict[str, Any]], small_dataset: Dataset, tmp_path: Path
) -> None:
    def way(name: str, address: str | None) -> tuple[Path, Path, tt.Report]:
        config = parse_config(small_values(tmp_path / name))
        checkpoints = tt.train(config, small_dataset, address=address)
        generation = tt.build(config, small_dataset, checkpoints, address=address)
        report = tt.evaluate(config, small_dataset, checkpoints, address=address)
        return checkpoints.served, generation, report

    (here, here_generation, here_report), (there, there_generation, there_report) = (
        way("here", None),
        way("there", "auto"),
    )
    assert here.name == there.name
    weights = [safetensors.torch.load_file(path / "model.safetensors") for path in (here, there)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        np.testing.assert_allclose(tensor.numpy(), weights[1][name].numpy(), atol=1e-6, err_msg=name)
    manifests = [read_manifest(path, "checkpoint") for path in (here, there)]
    assert manifests[0].keys() == manifests[1].keys()
    for first, second in zip(*(m["history"] for m in manifests), strict=True):
        assert first | {"seconds": 0} == pytest.approx(second | {"seconds": 0}, abs=1e-6)
    # The weights are the same to the bit where neither way computes in another order.
    assert (Checkpoint.open(here).fingerprint == Checkpoint.open(there).fingerprint) == (
        here_generation.name == there_generation.name
    )
    found, wanted = Generation.open(here_generation), Generation.open(there_generation)
    assert set(found.manifest["files"]) == set(wanted.manifest["files"])
    rows = np.arange(small_dataset.num_catalogue_items)
    np.testing.assert_allclose(found.searcher().vectors(rows), wanted.searcher().vectors(rows), atol=1e-6)
    assert here_report.by_ranker.keys() == there_report.by_ranker.keys()
    for ranker, metrics in here_report.by_ranker.items():
        assert metrics == pytest.approx(there_report.by_ranker[ranker], abs=2e-3, rel=2e-3)

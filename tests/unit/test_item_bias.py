"""A number of each item's own that is added to all its scores, and is no part of how near items are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import twotower as tt
from tests.generations import catalogue_vectors, plain_generation
from tests.shard_groups import whole
from tests.shop import fresh_checkpoint, make_config, write_files
from twotower.config import parse_config
from twotower.config.model import TowerConfig
from twotower.data.prepare import prepare
from twotower.errors import ConfigError
from twotower.generations.generation import Generation
from twotower.model.towers import Tower
from twotower.pipeline.ranking import place_popular
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever
from twotower.training.collectives import World
from twotower.training.loop import Trainer
from twotower.training.validation import encode_catalogue


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A generation of a model with item biases, and the vectors of its catalogue."""
    root = tmp_path_factory.mktemp("bias")
    write_files(root / "files")
    values = make_config(root).to_json()
    values["model"]["item_bias"] = True
    # Exact answers, to be compared with.
    values["index"]["factory"] = "Flat"
    config = parse_config(values)
    dataset = prepare(config)
    checkpoint = fresh_checkpoint(config, dataset, root / "checkpoint")
    return plain_generation(config, dataset, checkpoint, "g1"), catalogue_vectors(checkpoint, dataset)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_last_coordinate_is_the_bias(normalize: bool) -> None:
    torch.manual_seed(4)
    x = torch.randn(7, 6)
    plain, item, query = (
        Tower(6, 5, TowerConfig(hidden=[]), None, normalize, bias) for bias in ("none", "learned", "one")
    )
    for tower in (item, query):
        tower.load_state_dict(plain.state_dict())
    out = plain.output(x)
    near = out[:, :-1] / out[:, :-1].norm(dim=1, keepdim=True) if normalize else out[:, :-1]
    assert torch.allclose(item(x), torch.cat([near, out[:, -1:]], dim=1))
    assert torch.allclose(query(x), torch.cat([near, torch.ones(7, 1)], dim=1))
    assert plain(x).shape == item(x).shape


def test_it_learns_what_is_popular_with_everybody(
    small_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = small_values(tmp_path, features={"query": [{"name": "history", "type": "history", "dim": 24}]})
    values["features"]["item"] = [{"name": "item_id", "type": "id", "dim": 24}]
    values["model"] = {"embedding_dim": 24, "item_bias": True, "item_tower": {"hidden": []}}
    values["train"] |= {"epochs": 4, "optimizer": {"table_learning_rate": 0.02}}
    config = parse_config(values)
    dataset = prepare(config)
    trainer = Trainer(config, dataset, World(), "train")
    while trainer.epoch < 4:
        trainer.run_epoch()
    bias = encode_catalogue(trainer.model, trainer.inputs, trainer.world)[:, -1]
    counts = trainer.source.item_counts()[: len(bias)]
    assert spearmanr(bias, counts).statistic > 0.5


def test_scores_are_the_cosine_and_the_bias(built: tuple[Path, np.ndarray]) -> None:
    path, vectors = built
    retriever = Retriever.open(path)
    query = Query(user_id="1", k=20, exclude_seen=False)
    encoded = retriever.encode([query]).vectors[0]
    assert encoded[-1] == 1
    cosines = vectors[:, :-1] @ encoded[:-1]
    assert np.abs(cosines).max() <= 1 + 1e-6
    found = retriever.retrieve(query).items
    expected = np.sort(cosines + vectors[:, -1])[::-1][:20]
    np.testing.assert_allclose([item["score"] for item in found], expected, atol=1e-5)


def test_similar_items_are_near_whatever_their_bias(built: tuple[Path, np.ndarray]) -> None:
    path, vectors = built
    ids = Generation.open(path).item_ids
    item = 8
    cosines = vectors[:, :-1] @ vectors[item, :-1]
    cosines[item] = -2
    expected = [ids.id(int(row)) for row in np.argsort(-cosines)[:10]]
    alone = Retriever.open(path).similar(ids.id(item), 10).items
    assert [found["item_id"] for found in alone] == expected
    np.testing.assert_allclose([found["score"] for found in alone], np.sort(cosines)[::-1][:10], atol=1e-5)

    async def through_groups() -> bytes:
        return await whole(path, 2).similar(ids.id(item), 10, [], None)

    assert [found["item_id"] for found in json.loads(asyncio.run(through_groups()))["items"]] == expected


def test_the_map_of_a_report_shows_what_is_near(tmp_path: Path, rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    rows = np.arange(0, 40, 2)
    maps = []
    for scale in (0, 100):
        vectors[:, -1] = scale * rng.normal(size=40)
        np.save(tmp_path / f"{scale}.npy", vectors)
        maps.append(place_popular(str(tmp_path / f"{scale}.npy"), rows, 5, seed=3))
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model.embedding_dim": 1}, r"item_bias takes the last coordinate, and embedding_dim \(1\)"),
        (
            {"train.loss.kind": "bsl"},
            "bsl falls without end .*, and model.item_bias has no limit",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tt.configure({"model.item_bias": True, **settings})

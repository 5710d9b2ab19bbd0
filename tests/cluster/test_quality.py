"""The committed configurations reach what they are there for, through Ray Train and the evaluation on Ray."""

from pathlib import Path

import pytest

from twotower.artefacts import read_manifest
from twotower.cluster.evaluate import evaluate
from twotower.cluster.train import train
from twotower.config import load_config
from twotower.data.prepare import prepare

CONFIGS = Path(__file__).parents[2] / "configs"


def metrics_of(name: str, root: Path, *overrides: str) -> dict[str, float]:
    small = ["train.fit=train", "train.epochs=3", "evaluation.map_items=10"]
    # More would learn the same.
    small += ["train.num_workers=1", "cluster.num_encoders=1"]
    # Popularity is measured always; the other baselines are not what this asks for.
    small.append("evaluation.baselines=[]")
    config = load_config(CONFIGS / name, [f"storage.root={root}", *small, *overrides])
    dataset = prepare(config)
    report = evaluate(config, dataset, train(config, dataset), None)
    metrics: dict[str, float] = read_manifest(report, "report")["metrics"]
    return metrics


@pytest.mark.slow
def test_movielens_is_well_above_popularity(
    ray_local: None, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOTOWER_MIRROR", str(mirror))
    found = metrics_of("movielens.yaml", tmp_path)
    assert found["popularity_ndcg@10"] == pytest.approx(0.0905, abs=5e-4)
    assert found["popularity_recall@100"] == pytest.approx(0.2034, abs=5e-4)
    assert found["ndcg@10"] >= 0.115
    assert found["recall@100"] >= 0.30


@pytest.mark.slow
def test_planted_tastes_are_found(ray_local: None, tmp_path: Path) -> None:
    found = metrics_of("generated.yaml", tmp_path, "data.source.num_users=1500", "data.source.seed=91")
    assert found["true_model_recall@10"] > 2 * found["popularity_recall@10"] > 0
    assert found["recall@10"] >= 2 * found["popularity_recall@10"]
    assert found["recall@10"] >= 0.6 * found["true_model_recall@10"]
    assert found["recall@10"] <= found["true_model_recall@10"]

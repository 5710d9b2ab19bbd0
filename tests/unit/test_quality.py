"""The committed configurations reach what they are there for, in one process; on Ray it is the same.

tests/cluster/test_library.py and tests/cluster/test_train.py show that it is the same.
"""

from pathlib import Path

import pytest

import twotower as tt

CONFIGS = Path(__file__).parents[2] / "configs"


def metrics_of(name: str, root: Path, *overrides: str) -> dict[str, float]:
    small = ["train.fit=train", "train.epochs=3", "evaluation.map_items=10"]
    # Popularity is measured always; the other baselines are not what this asks for.
    small.append("evaluation.baselines=[]")
    config = tt.load_config(CONFIGS / name, [f"storage.root={root}", *small, *overrides])
    dataset = tt.prepare(config)
    return dict(tt.evaluate(config, dataset, tt.train(config, dataset)).metrics)


@pytest.mark.slow
def test_movielens_is_well_above_popularity(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOTOWER_MIRROR", str(mirror))
    found = metrics_of("movielens.yaml", tmp_path)
    assert found["popularity_ndcg@10"] == pytest.approx(0.0905, abs=5e-4)
    assert found["popularity_recall@100"] == pytest.approx(0.2034, abs=5e-4)
    assert found["ndcg@10"] >= 0.115
    assert found["recall@100"] >= 0.30


@pytest.mark.slow
def test_planted_tastes_are_found(tmp_path: Path) -> None:
    found = metrics_of("generated.yaml", tmp_path, "data.source.num_users=1500", "data.source.seed=91")
    assert found["true_model_recall@10"] > 2 * found["popularity_recall@10"] > 0
    assert found["recall@10"] >= 2 * found["popularity_recall@10"]
    assert found["recall@10"] >= 0.6 * found["true_model_recall@10"]
    assert found["recall@10"] <= found["true_model_recall@10"]

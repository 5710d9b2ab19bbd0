"""What ``benchmarks.quality`` reads of its command, and what it makes of the reports of several seeds."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from benchmarks.quality import TASKS, settings_of, summary
from twotower.config import load_config

KNN = {
    "item_knn_cosine": {"recall@10": 0.1, "ndcg@10": 0.2, "recall@100": 0.4},
    "item_knn_tfidf": {"recall@10": 0.16, "ndcg@10": 0.1, "recall@100": 0.3},
}
RUNS = [
    {"model": {"recall@10": 0.2, "ndcg@10": 0.3, "recall@100": 0.5}, **KNN},
    {"model": {"recall@10": 0.24, "ndcg@10": 0.3, "recall@100": 0.5}, **KNN},
]


def test_a_ratio_is_over_the_better_ranker_and_the_mean_of_seeds():
    figures, table = summary(TASKS["tafeng"], RUNS, [1, 2])
    assert figures == {
        "ten_lines_recall_at_10_over_knn": pytest.approx((0.2 / 0.16 + 0.24 / 0.16) / 2),
        "ten_lines_ndcg_at_10_over_knn": pytest.approx(0.3 / 0.2),
    }
    assert [row[0] for row in table] == ["model", "item_knn_cosine", "item_knn_tfidf", "twotower"]
    assert table[-1][1] == "0.2200 +- 0.0283"


def test_published_rows_stand_beside():
    runs = [{"model": {"recall@20": 0.18, "ndcg@20": 0.15}}]
    figures, table = summary(TASKS["gowalla"], runs, [42])
    assert figures == {"recall_at_20": 0.18, "ndcg_at_20": 0.15}
    assert ["LightGCN (paper)", "0.1830", "0.1554", "published"] in table


def test_a_ratio_to_what_was_not_measured_is_left_out():
    figures, _ = summary(TASKS["generated"], RUNS, [1, 2])
    assert figures == {}


def test_the_set_of_a_name_a_folder_and_a_configuration(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("interactions.csv", "user,item,t\n1,2,3\n")
        archive.writestr("items.csv", "item,attributes\n2,7\n")
    name, task, config, overrides = settings_of("tafeng", str(tmp_path / "b.zip"), tmp_path)
    assert (name, task) == ("tafeng", TASKS["tafeng"])
    assert overrides == [f"data.source.interactions={tmp_path / 'raw' / 'interactions.csv'}"]
    assert load_config(config, overrides).name == "tafeng"
    (tmp_path / "train.txt").write_text("0 1\n")
    name, task, config, overrides = settings_of(str(tmp_path), None, tmp_path)
    assert load_config(config, overrides).data.source.kind == "lightgcn"
    assert task.figures == ()
    own = tmp_path / "my own.yaml"
    own.write_text("name: mine\n")
    assert settings_of(str(own), None, tmp_path)[::2] == ("my-own", str(own))


@pytest.mark.parametrize(("name", "message"), [("nothing", "the sets are gowalla"), ("gowalla", "by --data")])
def test_what_is_missing_is_named(name: str, message: str, tmp_path: Path):
    with pytest.raises(SystemExit, match=message):
        settings_of(name, None, tmp_path)

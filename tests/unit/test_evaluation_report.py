"""The report: its numbers, its page and its pictures."""

import json
import math
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.image import imread

from tests.apart import run_apart
from tests.report_content import Page
from twotower.evaluation import plots, report
from twotower.schema import CategoricalFeature, FeatureSchema, FittedFeature, IdFeature, MultiHotFeature


@pytest.fixture
def history():
    return [
        {"epoch": e, "loss": 5.0 / e, "validation_recall": 0.1 * e, "validation_ndcg": 0.04 * e}
        for e in (1, 2, 3)
    ]


@pytest.fixture
def item_map(rng):
    groups = rng.choice(["Drama", "Comedy", "other"], 40).tolist()
    titles = [f"$ale of item {i}" if i % 5 else None for i in range(40)]
    return report.ItemMap(rng.normal(size=(40, 2)), groups, titles, "genres")


@pytest.fixture
def results(history, item_map):
    return report.Results(
        inputs={"name": "films", "dataset": "d1", "checkpoint": "c1", "generation": "g1", "seed": 3},
        counts={"users": 90, "without_relevant": 7, "not_drawn": 0, "evaluated": 83, "items": 210},
        metrics={
            "model": {"recall@10": 0.25, "coverage@10": 0.5, "same_top10": 0.125},
            "popularity": {"recall@10": 0.0625, "coverage@10": math.nan, "same_top10": 1.0},
        },
        history=history,
        best_epoch=2,
        validation_k=100,
        latencies_ms=np.array([1.0, 2.0, 3.0, 14.0]),
        latency_k=20,
        map=item_map,
    )


def drawn(path):
    """Share of the picture that is not white."""
    picture = imread(path)
    return float((picture[..., :3].min(axis=2) < 0.9).mean())


def test_report_files(tmp_path, results):
    report.write_report(tmp_path, results)
    assert {p.name for p in tmp_path.iterdir()} == {
        "report.html",
        "report.json",
        "report.md",
        "training.png",
        "latency.png",
        "item_map.png",
    }
    for picture in tmp_path.glob("*.png"):
        assert 0.005 < drawn(picture) < 0.9, picture
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["metrics"]["model"] == results.metrics["model"]
    assert content["metrics"]["popularity"]["coverage@10"] is None
    assert content["latency"]["requests"] == 4
    assert content["pictures"] == ["training.png", "latency.png", "item_map.png"]
    assert sum(content["latency"]["histogram"]["counts"]) == 4
    assert content["map"]["titles"] == results.map.titles
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables()["Accuracy at 10"][1:] == [["Two towers", "0.2500"], ["Popularity", "0.0625"]]
    assert len(page.all("use")) == 40


def test_a_map_keeps_its_shape(rng):
    points = rng.normal(size=(30, 2)) * [5.0, 2.0]
    found = report.map_items(report.ItemMap(points, ["a"] * 30, [None] * 30, "g"))
    drawn = np.stack([found["x"], found["y"]], axis=1)
    assert (drawn.min(), drawn.max()) == (0, 1000)
    scale = 1000 / np.ptp(points[:, 0])
    np.testing.assert_allclose(drawn - drawn[0], (points - points[0]) * scale, atol=1.01)
    same = report.map_items(report.ItemMap(np.ones((3, 2)), ["a"] * 3, [None] * 3, "g"))
    assert same["x"] == same["y"] == [0, 0, 0]


def test_bins_end_behind_the_goal_and_p99():
    quick, slow = np.full(200, 2.0), np.linspace(1.0, 40.0, 200)
    found = report.latency_bins(quick, 2.0)
    assert (found["edges_ms"][0], found["edges_ms"][-1]) == (0.0, pytest.approx(11.0))
    assert (sum(found["counts"]), found["beyond"]) == (200, 0)
    found = report.latency_bins(slow, 20.0)
    assert found["edges_ms"][-1] == pytest.approx(28.0)
    assert found["beyond"] == int((slow > 28.0).sum()) > 0
    assert np.histogram(slow, found["edges_ms"])[0].tolist() == found["counts"]


def test_page_has_popularity_beside_the_model(tmp_path, results):
    report.write_report(tmp_path, results)
    page = (tmp_path / "report.md").read_text()
    assert "| metric | model | popularity |" in page
    assert "| Recall@10 | 0.2500 | 0.0625 |" in page
    assert "| Catalogue coverage@10 | 0.5000 | - |" in page
    assert "| Users with the most common top 10 | 0.1250 | 1.0000 |" in page
    assert "7 of 90 users have no relevant item" in page
    assert "true model" not in page
    assert page.count("![") == 3


def test_true_model_is_a_column_where_there_is_one(tmp_path, results):
    results.metrics["true_model"] = {"recall@10": 0.3125}
    report.write_report(tmp_path, results)
    page = (tmp_path / "report.md").read_text()
    assert "| metric | model | popularity | true model |" in page
    assert "| Recall@10 | 0.2500 | 0.0625 | 0.3125 |" in page


def test_without_generation_history_and_map_there_are_no_pictures(tmp_path, results):
    bare = report.Results(
        **{**results.__dict__, "latencies_ms": None, "history": [], "best_epoch": None, "map": None}
    )
    report.write_report(tmp_path, bare)
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "report.json", "report.md"}
    assert json.loads((tmp_path / "report.json").read_text())["latency"] is None


def test_flat_metrics(results):
    flat = report.flat_metrics(results)
    assert flat["recall@10"] == 0.25
    assert flat["popularity_recall@10"] == 0.0625
    assert flat["popularity_same_top10"] == 1.0
    assert "popularity_coverage@10" not in flat
    assert flat["latency_mean_ms"] == 5.0
    assert flat["latency_qps"] == 200.0


def test_latency_facts():
    facts = report.latency_facts(np.arange(1.0, 101.0), 7)
    assert facts["p50_ms"] == pytest.approx(50.5)
    assert facts["p95_ms"] == pytest.approx(95.05)
    assert facts["p99_ms"] == pytest.approx(99.01)
    assert facts["mean_ms"] == pytest.approx(50.5)
    assert facts["qps"] == pytest.approx(1000 / 50.5)
    assert facts["share_within_10_ms"] == pytest.approx(0.1)
    assert facts["k"] == 7


def test_pictures_of_the_smallest_and_of_extreme_inputs(tmp_path):
    plots.training_curves(tmp_path / "one.png", [{"epoch": 1, "loss": 2.0}], 100, None)
    same = np.full(5, 3.25)
    plots.latency_histogram(tmp_path / "same.png", same, report.latency_facts(same, 10))
    slow = np.array([2000.0, 2500.0])
    plots.latency_histogram(tmp_path / "slow.png", slow, report.latency_facts(slow, 10))
    plots.item_map(tmp_path / "map.png", np.zeros((10, 2)), ["other"] * 10, [None] * 10, "")
    assert all(drawn(path) > 0.001 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4


def test_titles_do_not_cover_each_other(monkeypatch, tmp_path, rng):
    """The boxes of the titles that stay are disjoint, and more than one stays."""
    boxes = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: boxes.extend(boxes_of(figure)))
    points = rng.normal(size=(300, 2))
    plots.item_map(
        tmp_path / "map.png", points, ["a"] * 300, [f"a title of some length {i}" for i in range(300)], "g"
    )
    assert len(boxes) > 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def boxes_of(figure):
    from matplotlib.text import Annotation

    figure.draw_without_rendering()
    return [t.get_window_extent() for t in figure.axes[0].texts if isinstance(t, Annotation)]


def test_more_groups_than_colours_are_other(monkeypatch, tmp_path, rng):
    labels = []
    monkeypatch.setattr(
        plots,
        "_save",
        lambda figure, path: labels.extend(t.get_text() for t in figure.axes[0].get_legend().texts),
    )
    groups = [f"g{i}" for i in range(12) for _ in range(i + 1)]
    plots.item_map(tmp_path / "map.png", rng.normal(size=(78, 2)), groups, [None] * 78, "genres")
    # The three smallest have 1 + 2 + 3 items.
    assert labels[0] == "g11 (12)"
    assert labels[-1] == "other (6)"
    assert len(labels) == 10


@pytest.mark.slow
def test_map_keeps_clusters_together_and_repeats_itself(rng):
    centres = rng.normal(size=(3, 11)) * 4
    member = np.arange(60) % 3
    vectors = (centres[member] + rng.normal(size=(60, 11)) * 0.3).astype(np.float32)
    points = report.place_items(vectors, seed=5)
    assert points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert Counter(member[distances.argmin(axis=1)] == member)[True] == 60
    np.testing.assert_array_equal(points, report.place_items(vectors, seed=5))


def dataset_of(features, **columns):
    count = len(next(iter(columns.values())))
    schema = FeatureSchema(
        query=[],
        item=[FittedFeature(spec=f) for f in features],
        num_users=1,
        num_items=count,
        num_catalogue_items=count,
    )
    table = pa.table(columns)
    return SimpleNamespace(
        schema=schema, item_table=lambda wanted=None: table.select(wanted) if wanted else table
    )


def test_main_group_is_the_first_value_of_the_first_multi_hot_feature():
    features = [
        CategoricalFeature(name="year"),
        MultiHotFeature(name="genres", column="kinds"),
        MultiHotFeature(name="tags"),
    ]
    dataset = dataset_of(features, year=["1", "2", "3", "4"], kinds=["B|A", None, " |C", ""], tags=["x"] * 4)
    assert report.item_groups(dataset, np.array([2, 0, 1, 3])) == (["C", "B", "other", "other"], "kinds")


def test_main_group_without_multi_hot_features():
    dataset = dataset_of([IdFeature(name="item_id"), CategoricalFeature(name="year")], year=[2001, None])
    assert report.item_groups(dataset, np.array([1, 0])) == (["other", "2001"], "year")
    assert report.item_groups(dataset_of([IdFeature(name="item_id")], x=[1, 2]), np.array([1])) == (
        ["other"],
        "",
    )


@pytest.mark.slow
def test_drawing_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from pathlib import Path; from twotower.evaluation import plots\n"
        "plots.training_curves(Path(sys.argv[1]), [{'epoch': 1, 'loss': 2.0}], 10, 1)\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    path = tmp_path / "training.png"
    assert subprocess.run([sys.executable, "-c", code, path], timeout=120, check=False).returncode == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_ranks_and_trains_imports_nothing_to_draw_with():
    code = "import sys, twotower.pipeline.evaluate, twotower.evaluation.sweep; print(*sys.modules)"
    done = run_apart(code)
    assert done.returncode == 0, done.stderr
    assert {"matplotlib", "scipy.stats", "tensorboardX"}.isdisjoint(done.stdout.split())

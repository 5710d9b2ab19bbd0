"""The final evaluation on a local Ray: the same numbers as slow loops, from a report that is made once."""

import copy
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from tests import oracles
from tests.generations import plain_generation
from tests.report_content import Page
from twotower.artefacts import has_manifest, read_manifest
from twotower.cluster.evaluate import evaluate, set_beside
from twotower.cluster.pool import work_through
from twotower.config import parse_config
from twotower.data.generated import true_scores
from twotower.data.histories import Histories
from twotower.errors import ArtefactError, ArtefactMismatchError, ConfigError, DataError
from twotower.evaluation.side_by_side import report_of, set_side_by_side
from twotower.model.checkpoint import Checkpoint, weights_of, write_checkpoint
from twotower.model.features import QueryFeatures, encode_columns, item_batch, profile_values
from twotower.model.towers import TwoTower
from twotower.pipeline import evaluate as module
from twotower.pipeline.runner import ranges

FITTED = ["item_knn_cosine", "item_knn_tfidf", "ease", "ials"]
RANKERS = ["model", "popularity", "recent_popularity", *FITTED, "true_model"]
HISTORY = [
    {
        "epoch": e,
        "loss": 6.0 / e,
        "validation_recall": 0.1 * e,
        "validation_ndcg": 0.05 * e,
        "temperature": 0.07,
        "seconds": 1.0,
    }
    for e in (1, 2)
]


def variant(config, root, **sections):
    values = copy.deepcopy(config.to_json())
    values["storage"]["root"] = str(root)
    for name, changes in sections.items():
        values[name] |= changes
    return parse_config(values)


def untrained(directory, config, dataset, seed=3, **facts):
    """A checkpoint of fresh towers: what is measured of it must be right, not good."""
    directory.mkdir(parents=True)
    model = TwoTower(dataset.schema, config.model, config.train.loss.temperature, seed=seed)
    facts = {"fit": "train", "epoch": 2, "best_epoch": 2, "history": HISTORY, "metrics": {}} | facts
    write_checkpoint(directory, weights_of(model), dataset, config, facts)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_config, small_dataset):
    return untrained(tmp_path_factory.mktemp("evaluate") / "checkpoint", small_config, small_dataset)


@pytest.fixture(scope="module")
def config(tmp_path_factory, small_config):
    return variant(small_config, tmp_path_factory.mktemp("reports"), evaluation={"slices": ["genres"]})


@pytest.fixture(scope="module")
def generation(config, small_dataset, checkpoint):
    return plain_generation(config, small_dataset, Checkpoint.open(checkpoint), "g1")


@pytest.fixture(scope="module")
def report(ray_local, config, small_dataset, checkpoint, generation):
    return evaluate(config, small_dataset, checkpoint, generation)


def expected_metrics(dataset, checkpoint_dir, ks, lists=False):
    """The protocol again, user by user, from the interactions."""
    log, num_items = dataset.interactions, dataset.num_catalogue_items
    test = log.split == 2
    users, masked, relevant = [], [], []
    for user in range(dataset.num_users):
        mine = log.user_row == user
        had = {int(i) for i in log.item_row[mine & ~test] if i < num_items}
        took = {int(i) for i in log.item_row[mine & test & (log.kind == 0)] if i < num_items}
        if took - had:
            users.append(user)
            masked.append(had)
            relevant.append(took - had)
    checkpoint = Checkpoint.open(checkpoint_dir)
    schema = checkpoint.schema
    item_columns = encode_columns(schema.item, dataset.item_table())
    items = checkpoint.model.encode_items(item_batch(schema, np.arange(num_items), item_columns)).numpy()
    histories = Histories.of(log.select(~test))
    rows, weights = histories.before(users, None, schema.max_history)
    columns = encode_columns(schema.query, dataset.user_table())
    features = QueryFeatures(schema, profile_values(schema, item_columns))
    batch = features(users, {n: c[users] for n, c in columns.items()}, rows, weights)
    queries = checkpoint.model.encode_queries(batch).numpy()
    counts = np.bincount(log.item_row[~test & (log.kind == 0)], minlength=num_items)[:num_items]
    ones = np.ones((len(users), 1))
    ranked_by = {
        "model": oracles.top_k(queries, items, masked, max(ks)),
        "popularity": oracles.top_k(ones, counts[:, None], masked, max(ks)),
    }
    scores = true_scores(dataset.source, dataset.user_ids.ids(users))
    ranked_by["true_model"] = [
        oracles.top_k(np.ones((1, 1)), row[:, None], [m], max(ks))[0]
        for row, m in zip(scores, masked, strict=True)
    ]
    if lists:
        return users, ranked_by
    return users, {
        ranker: {
            **{
                f"{name}@{k}": np.mean(
                    [getattr(oracles, f"{name}_at_k")(r, s, k) for r, s in zip(ranked, relevant, strict=True)]
                )
                for name in ("recall", "ndcg", "mrr", "hit_rate", "precision")
                for k in ks
            },
            **{f"coverage@{k}": oracles.coverage_at_k(ranked, num_items, k) for k in ks},
            **{f"mean_popularity@{k}": np.mean([counts[row[:k]].mean() for row in ranked]) for k in ks},
            "same_top10": oracles.share_same_top10(ranked),
        }
        for ranker, ranked in ranked_by.items()
    }


def recommended(dataset, checkpoint_dir):
    """Users and what the model recommends to them, by the slow loops."""
    users, expected = expected_metrics(dataset, checkpoint_dir, [10], lists=True)
    return [int(user) for user in users], expected["model"]


def test_every_number_equals_the_slow_loops(report, config, small_dataset, checkpoint):
    assert len(ranges(small_dataset.num_users, config)) > 2
    users, expected = expected_metrics(small_dataset, checkpoint, config.evaluation.ks)
    content = json.loads((report / "report.json").read_text())
    assert content["counts"]["evaluated"] == len(users)
    assert content["counts"]["users"] == len(users) + content["counts"]["without_relevant"]
    assert list(content["metrics"]) == RANKERS
    assert content["left_out"] == {}
    for ranker, metrics in expected.items():
        found = {name: content["metrics"][ranker][name] for name in metrics}
        # Rounding may swap two items of nearly equal scores, which moves a mean over 300 users by little.
        assert found == pytest.approx(metrics, abs=2e-3, rel=2e-3), ranker
    assert expected["true_model"]["recall@10"] > 1.5 * expected["popularity"]["recall@10"] > 0
    assert expected["model"]["same_top10"] < expected["popularity"]["same_top10"]


def test_manifest_has_popularity_beside_each_metric(report):
    metrics = read_manifest(report, "report")["metrics"]
    for name in ("recall", "ndcg", "mrr", "hit_rate", "coverage"):
        for k in (5, 10):
            assert {f"{name}@{k}", f"popularity_{name}@{k}", f"true_model_{name}@{k}"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_report_holds_its_files_and_nothing_of_the_work(report):
    assert {p.name for p in report.iterdir()} == {
        "manifest.json",
        "config.json",
        "report.html",
        "report.json",
        "report.md",
        "users.parquet",
        "training.png",
        "latency.png",
        "item_map.png",
    }
    assert not [p for p in report.parent.iterdir() if p.name.endswith(".partial")]


def test_the_page_shows_what_was_measured(report, config, small_dataset, checkpoint):
    content = json.loads((report / "report.json").read_text())
    page = Page((report / "report.html").read_text())
    tables = page.tables()
    for k in config.evaluation.ks:
        rows = {row[0]: row for row in tables[f"Accuracy at {k}"]}
        recall = rows["ranker"].index("Recall")
        assert rows["Two towers"][recall] == f"{content['metrics']['model'][f'recall@{k}']:.4f}"
        # The curve is of the same lists as the table.
        by_k = content["recall_by_k"]
        assert k in by_k["ks"]
        for ranker, metrics in content["metrics"].items():
            assert by_k["rankers"][ranker][by_k["ks"].index(k)] == pytest.approx(metrics[f"recall@{k}"])
    data = dict(tables["Data"])
    assert data["users"] == str(small_dataset.num_users)
    assert data["items of the catalogue"] == str(small_dataset.num_catalogue_items)
    assert small_dataset.fingerprint in dict(tables["Lineage"]).values()
    assert sum(content["latency"]["histogram"]["counts"]) + content["latency"]["histogram"]["beyond"] == (
        config.evaluation.latency_requests
    )
    assert len(page.all("use")) == len(content["map"]["x"]) > 50


def test_what_is_shown_of_the_lists_is_that_of_all_users(report, config, small_dataset, checkpoint):
    content = json.loads((report / "report.json").read_text())
    bands = content["exposure"]["bands"]
    assert sum(band["items"] for band in bands) == small_dataset.num_catalogue_items
    assert sum(band["recommended"] for band in bands) == pytest.approx(1.0)
    assert sum(band["consumed"] for band in bands) == pytest.approx(1.0)
    examples = content["examples"]
    assert len({example["user_id"] for example in examples}) == config.evaluation.examples == 4
    # What the model recommends to one of them, by the slow loops.
    users, lists = recommended(small_dataset, checkpoint)
    for example in examples:
        place = users.index(small_dataset.user_ids.rows([example["user_id"]])[0])
        expected = [small_dataset.item_ids.id(row) for row in lists[place][:10]]
        found = [item["item_id"] for item in example["recommended"]]
        # Rounding may swap two items of nearly equal scores.
        assert len(found) == 10
        assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 2


def test_latency_is_of_single_requests_on_the_generation(report, config):
    latency = json.loads((report / "report.json").read_text())["latency"]
    assert latency["requests"] == config.evaluation.latency_requests
    assert latency["k"] == max(config.evaluation.ks)
    assert 0 < latency["p50_ms"] <= latency["p95_ms"] <= latency["p99_ms"] <= latency["max_ms"]
    assert latency["qps"] == pytest.approx(1000 / latency["mean_ms"])
    assert read_manifest(report, "report")["metrics"]["latency_p50_ms"] == latency["p50_ms"]


def test_same_inputs_are_evaluated_once(report, config, small_dataset, checkpoint, generation, monkeypatch):
    monkeypatch.setattr(module, "_measure", None)
    before = (report / "manifest.json").stat().st_mtime_ns
    assert evaluate(config, small_dataset, checkpoint, generation) == report
    assert (report / "manifest.json").stat().st_mtime_ns == before


def test_parts_and_actors_change_nothing(report, config, small_dataset, checkpoint, tmp_path):
    other = variant(config, tmp_path, cluster={"num_encoders": 2, "encode_batch_size": 50})
    assert ranges(300, other) != ranges(300, config)
    again = evaluate(other, small_dataset, checkpoint, None)
    # The other one also has the latency of a generation.
    assert again.name != report.name
    assert not (again / "latency.png").exists()
    first, second = (read_manifest(path, "report") for path in (report, again))
    assert second["counts"] == first["counts"]
    for ranker, metrics in first["by_ranker"].items():
        assert second["by_ranker"][ranker] == pytest.approx(metrics, abs=2e-3, rel=2e-3)


def test_baselines_learn_and_differ(report):
    metrics = json.loads((report / "report.json").read_text())["metrics"]
    for ranker in FITTED:
        assert metrics[ranker]["recall@10"] > 1.2 * metrics["popularity"]["recall@10"], ranker
        assert metrics[ranker]["recall@10"] <= 1.1 * metrics["true_model"]["recall@10"], ranker
    assert len({metrics[ranker]["ndcg@10"] for ranker in RANKERS}) == len(RANKERS)
    settings = json.loads((report / "report.json").read_text())["baselines"]
    assert settings["ease"]["l2_chosen_by"] == "validation"
    assert settings["item_knn_tfidf"] == {"neighbours": 200}


def test_users_are_kept_one_by_one(report, small_dataset):
    content = json.loads((report / "report.json").read_text())
    table = pq.read_table(report / "users.parquet")
    assert table.num_rows == content["counts"]["evaluated"]
    assert table["user_row"].to_pylist() == sorted(set(table["user_row"].to_pylist()))
    # No id of a person is in a report.
    assert "user_id" not in table.column_names
    for ranker in RANKERS:
        for name in ("recall@5", "ndcg@10", "map@10", "precision@5"):
            column = name if ranker == "model" else f"{ranker}_{name}"
            mean = np.mean(table[column].to_numpy(), dtype=np.float64)
            assert mean == pytest.approx(content["metrics"][ranker][name], abs=1e-6), column
    log = small_dataset.interactions
    first = table["user_row"][0].as_py()
    mine = (log.user_row == first) & (log.split != 2) & (log.kind == 0)
    assert table["known"][0].as_py() == len(np.unique(log.item_row[mine]))


def test_intervals_and_differences_hold_the_means(report):
    content = json.loads((report / "report.json").read_text())
    for ranker in RANKERS:
        for name, (low, high) in content["intervals"][ranker].items():
            assert low <= content["metrics"][ranker][name] <= high
            assert low < high
    assert set(content["differences"]) == set(RANKERS) - {"model"}
    gap = content["differences"]["popularity"]["recall@10"]
    metrics = content["metrics"]
    expected = metrics["model"]["recall@10"] - metrics["popularity"]["recall@10"]
    assert gap["difference"] == pytest.approx(expected, abs=1e-6)
    assert gap["low"] < gap["difference"] < gap["high"]
    assert content["differences"]["true_model"]["recall@10"]["p"] < 1e-6


def test_slices_part_the_users_and_their_relevant_items(report, config):
    slices = json.loads((report / "report.json").read_text())["slices"]
    content = json.loads((report / "report.json").read_text())
    activity = [piece for piece in slices if piece["by"] == "activity"]
    assert sum(piece["users"] for piece in activity) == content["counts"]["evaluated"]
    for ranker in RANKERS:
        parts = [piece["metrics"][ranker]["recall@10"] * piece["users"] for piece in activity]
        whole = content["metrics"][ranker]["recall@10"] * content["counts"]["evaluated"]
        assert sum(parts) == pytest.approx(whole, rel=1e-5)
    by = {piece["by"] for piece in slices}
    assert by == {"activity", "popularity", "genres"}
    popular = {p["value"]: p["metrics"]["popularity"] for p in slices if p["by"] == "popularity"}
    assert popular["head"]["recall@10"] > popular["tail"]["recall@10"]


def test_every_slice_is_in_the_page(report):
    page = (report / "report.md").read_text()
    assert "## NDCG@5 by slice" in page
    assert "| activity | users | model |" in page
    assert "EASE^R" in page
    assert "p = " in page or "p < " in page


@pytest.fixture(scope="module")
def other_report(ray_local, config, small_dataset, tmp_path_factory):
    """Another model on the same test, with other cut-offs."""
    folder = tmp_path_factory.mktemp("other")
    other = variant(config, folder, evaluation={"ks": [10, 15], "baselines": ["popularity"], "slices": []})
    checkpoint = untrained(folder / "checkpoint", other, small_dataset, seed=4)
    return evaluate(other, small_dataset, checkpoint, None)


def test_two_models_side_by_side(report, other_report, config, small_dataset, checkpoint, generation, capsys):
    both = set_beside(config, small_dataset, checkpoint, generation, other_report)
    assert both not in (report, other_report)
    mine, theirs, joined = (json.loads((p / "report.json").read_text()) for p in (report, other_report, both))
    assert joined["metrics"]["model"] == mine["metrics"]["model"]
    compared = joined["metrics"]["compared"]
    assert (
        compared["recall@10"]
        == theirs["metrics"]["model"]["recall@10"]
        != mine["metrics"]["model"]["recall@10"]
    )
    assert {name.partition("@")[2] for name in compared} == {"10", ""}
    gap = joined["differences"]["compared"]["recall@10"]
    assert gap["difference"] == pytest.approx(
        mine["metrics"]["model"]["recall@10"] - compared["recall@10"], abs=1e-6
    )
    assert gap["low"] < gap["difference"] < gap["high"]
    tables = [pq.read_table(p / "users.parquet")["recall@10"].to_numpy() for p in (report, other_report)]
    assert gap["p"] == pytest.approx(stats.ttest_rel(*(t.astype(float) for t in tables)).pvalue, rel=1e-3)
    assert joined["inputs"]["compared"] == other_report.name
    assert "compared model" in capsys.readouterr().err
    assert "| metric | model | compared model | popularity |" in (both / "report.md").read_text()
    assert read_manifest(both, "report")["metrics"]["compared_recall@10"] == compared["recall@10"]
    piece = next(p for p in joined["slices"] if p["by"] == "activity")
    assert "compared" in piece["metrics"]
    # It is made once.
    before = (both / "manifest.json").stat().st_mtime_ns
    assert set_beside(config, small_dataset, checkpoint, generation, other_report) == both
    assert (both / "manifest.json").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def fewer(config, tmp_path_factory):
    """Of 40 users, and of one baseline that is too large."""
    small = {"max_users": 40, "ease": {"max_size": 5}, "baselines": ["ease"], "slices": []}
    return variant(config, tmp_path_factory.mktemp("fewer"), evaluation=small)


def test_what_is_left_out_is_said(ray_local, fewer, small_dataset, checkpoint, capsys):
    report = evaluate(fewer, small_dataset, checkpoint, None)
    content = json.loads((report / "report.json").read_text())
    assert "evaluation.ease.max_size is 5" in content["left_out"]["ease"]
    assert "ease" not in content["metrics"]
    assert "EASE^R is left out: its weights" in (report / "report.md").read_text()
    assert "EASE^R is left out: its weights" in capsys.readouterr().err
    # Said again where the report is found.
    evaluate(fewer, small_dataset, checkpoint, None)
    assert "EASE^R is left out: its weights" in capsys.readouterr().err


def test_reports_of_other_splits_are_not_compared(report, fewer, config, small_dataset, checkpoint, tmp_path):
    other = evaluate(fewer, small_dataset, checkpoint, None)
    splits = [read_manifest(path, "report")["split"] for path in (report, other)]
    assert splits[0] != splits[1]
    with pytest.raises(ArtefactMismatchError, match=f"split {splits[0]} of dataset .* split {splits[1]} of"):
        set_side_by_side(report, other)
    unmade = variant(config, tmp_path / "never")
    with pytest.raises(ArtefactMismatchError, match=f"split {splits[0]} .* split {splits[1]}"):
        set_beside(unmade, small_dataset, checkpoint, None, other)
    assert not unmade.reports.exists(), "refused before anything was measured"


def test_a_report_that_is_not_there_is_named(config, tmp_path):
    with pytest.raises(ArtefactError, match="--compare nowhere: there is no finished report"):
        report_of(tmp_path, "nowhere")


def test_one_answer_for_everybody_is_said(ray_local, config, small_dataset, tmp_path, capsys):
    """A query tower that gives all users one vector: equal scores for all of them."""
    directory = tmp_path / "same"
    directory.mkdir()
    model = TwoTower(small_dataset.schema, config.model, 0.07, seed=3)
    weights = weights_of(model)
    last = [name for name in weights if name.startswith("towers.query")]
    weights |= {name: torch.zeros_like(weights[name]) for name in last}
    write_checkpoint(directory, weights, small_dataset, config, {"fit": "train", "history": []})
    # More than the catalogue has.
    few = {"baselines": ["popularity"], "ks": [5, 500], "slices": []}
    mine = variant(config, tmp_path, evaluation=few)
    report = evaluate(mine, small_dataset, directory, None)
    content = json.loads((report / "report.json").read_text())
    assert "The model gives most users the same answer" in content["collapse"]
    assert "100%" in content["collapse"]
    assert content["collapse"] in capsys.readouterr().err
    assert content["collapse"] in (report / "report.md").read_text()
    # Everything that is not masked is in a list of 500.
    assert content["metrics"]["model"]["recall@500"] == 1.0
    assert content["metrics"]["model"]["coverage@500"] == 1.0
    assert content["metrics"]["model"]["precision@500"] < 0.1
    assert list(content["metrics"]) == ["model", "popularity", "true_model"]


def test_a_model_that_tells_users_apart_has_not_collapsed(report):
    assert json.loads((report / "report.json").read_text())["collapse"] is None


def test_model_that_has_seen_the_test_split_is_refused(config, small_dataset, tmp_path):
    seen = untrained(tmp_path / "all", config, small_dataset, fit="all")
    with pytest.raises(ConfigError, match="test split included"):
        evaluate(config, small_dataset, seen, None)


def test_checkpoint_of_another_dataset_is_refused(config, small_dataset, tmp_path):
    other = untrained(tmp_path / "other", config, small_dataset, dataset_fingerprint="0123")
    with pytest.raises(ArtefactMismatchError, match="0123"):
        evaluate(config, small_dataset, other, None)


def test_generation_of_another_vocabulary_is_refused(config, small_dataset, checkpoint, generation, tmp_path):
    other = json.loads((generation / "manifest.json").read_text()) | {"vocabulary_hash": "4567"}
    (tmp_path / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(ArtefactMismatchError, match="4567"):
        evaluate(config, small_dataset, checkpoint, tmp_path)


def test_diverged_model_is_an_error_and_leaves_nothing(ray_local, config, small_dataset, tmp_path):
    directory = tmp_path / "nan"
    directory.mkdir()
    model = TwoTower(small_dataset.schema, config.model, 0.07, seed=3)
    weights = weights_of(model)
    broken = [name for name in weights if name.startswith("towers.query")]
    weights |= {name: torch.full_like(weights[name], torch.nan) for name in broken}
    assert broken
    write_checkpoint(directory, weights, small_dataset, config, {"fit": "train", "history": []})
    mine = variant(config, tmp_path, evaluation={"baselines": ["popularity"], "slices": []})
    with pytest.raises(ArtefactError, match=r"^the query tower of checkpoint .*/nan gives .* not finite"):
        evaluate(mine, small_dataset, directory, None)
    assert not [p for p in mine.reports.iterdir() if has_manifest(p)]


class Failing:
    """An actor that refuses: at once, or when it is called."""

    def __init__(self, at_once: bool, device: str, threads: int) -> None:
        if at_once:
            raise ConfigError("nothing goes; change it")

    def __call__(self, batch: pa.Table) -> pa.Table:
        raise DataError("user 7 is odd; repair it")


@pytest.mark.parametrize(
    ("at_once", "error", "message"),
    [(True, ConfigError, "nothing goes; change it"), (False, DataError, "user 7 is odd; repair it")],
)
def test_errors_of_actors_are_plain(ray_local, config, at_once, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        list(work_through(Failing, {"at_once": at_once}, [{"start": 0, "stop": 1}], config, gpu=False))

"""How good the recommendations are: this project's row beside published ones and baselines, three seeds.

    python -m benchmarks.quality gowalla --data gowalla.zip
    python -m benchmarks.quality movielens --data /folder/with/ml-latest-small.zip
    python -m benchmarks.quality tafeng --data ta_feng.csv --seeds 42
    python -m benchmarks.quality mine.yaml

Trains the committed configuration on Ray with each seed. Validation chooses the epoch; the test split is
ranked once for each seed, with the whole catalogue and by the rules of ``docs/knowledge.md``. A path to a
configuration, or to a folder in LightGCN's format (train.txt and test.txt), is measured the same way.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from twotower.config import Config, load_config
from twotower.data.prepare import prepare
from twotower.errors import TwotowerError
from twotower.progress import say
from twotower.training import preflight

CONFIGS = Path(__file__).parents[1] / "configs"
SEEDS = (42, 43, 44)
KNN = ("item_knn_cosine", "item_knn_tfidf")
Metrics = dict[str, dict[str, float]]
"""By ranker, then by metric."""


@dataclass(frozen=True)
class Figure:
    """A number of the result: the model's metric, or its ratio to the best of some rankers."""

    key: str
    metric: str
    over: tuple[str, ...] = ()

    def of(self, metrics: Metrics) -> float | None:
        """Return it; None where none of the rankers was measured."""
        value = metrics["model"][self.metric]
        if not self.over:
            return value
        others = [metrics[name][self.metric] for name in self.over if name in metrics]
        return value / max(others) if others else None


@dataclass(frozen=True)
class Task:
    """A public set: what is measured on it, and what others have published."""

    protocol: str
    figures: tuple[Figure, ...]
    shown: tuple[str, ...]
    """Metrics of the table."""
    source: str | None = None
    """Setting that ``--data`` gives; None where there is nothing to give."""
    published: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Rows of others, with the values of ``shown``."""
    quick: tuple[str, ...] = ("train.epochs=1",)


TASKS: dict[str, Task] = {
    "gowalla": Task(
        "LightGCN's split; every item ranked, train masked; published models mostly chose the epoch on test",
        (Figure("recall_at_20", "recall@20"), Figure("ndcg_at_20", "ndcg@20")),
        ("recall@20", "ndcg@20"),
        "data.source.path",
        (
            ("MF-BPR (BARS)", (0.1627, 0.1378)),
            ("YoutubeDNN, two towers (BARS)", (0.1754, 0.1473)),
            ("EASE^R (BARS)", (0.1765, 0.1467)),
            ("LightGCN (paper)", (0.1830, 0.1554)),
            ("SimpleX (BARS)", (0.1872, 0.1557)),
            ("MF + BSL (run logs)", (0.1882, 0.1584)),
            ("LightGCN + BSL (run logs)", (0.1892, 0.1590)),
        ),
    ),
    "beauty": Task(
        "Amazon Beauty 5-core, leave-one-out; every item ranked, what the user had masked",
        (Figure("recall_at_10", "recall@10"), Figure("ndcg_at_10", "ndcg@10")),
        ("recall@10", "ndcg@10"),
        "data.source.interactions",
        (
            ("HSTU (as the eSASRec paper quotes it)", (0.0788, 0.0439)),
            ("SASRec + sampled softmax (eSASRec paper)", (0.0921, 0.0531)),
            ("eSASRec (paper)", (0.0928, 0.0523)),
        ),
    ),
    "movielens": Task(
        "ml-latest-small, by user the last fifth by time is test; every item ranked, what came before masked",
        (
            Figure("recall_at_10_over_ease", "recall@10", ("ease",)),
            Figure("recall_at_100_over_ease", "recall@100", ("ease",)),
            Figure("ndcg_at_10_over_ease", "ndcg@10", ("ease",)),
        ),
        ("recall@10", "recall@100", "ndcg@10"),
        "mirror",
    ),
    "tafeng": Task(
        "Ta-Feng, the README's ten lines with its column names; by user the last fifth by day is test, "
        "targets are items that are new to the user",
        (
            Figure("ten_lines_recall_at_10_over_knn", "recall@10", KNN),
            Figure("ten_lines_ndcg_at_10_over_knn", "ndcg@10", KNN),
        ),
        ("recall@10", "ndcg@10", "recall@100"),
        "data.source.interactions",
    ),
    "generated": Task(
        "planted tastes; the true model ranks by the probabilities that the data was drawn from",
        (Figure("recall_over_true_model", "recall@10", ("true_model",)),),
        ("recall@10", "recall@100", "ndcg@10"),
    ),
}
_ANY = Task("as its configuration says", (), ("recall@10", "ndcg@10", "recall@100"))


def settings_of(name: str, data: str | None, root: Path) -> tuple[str, Task, str, list[str]]:
    """Return the name of the result, the task, the configuration and the overrides for its data.

    Raises:
        SystemExit: the set is unknown, or its data was not given.
    """
    if name not in TASKS:
        path = Path(name)
        label = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem)
        if (path / "train.txt").is_file() or path.suffix == ".zip":
            return label, _ANY, str(CONFIGS / "gowalla.yaml"), [f"data.source.path={path}"]
        if path.is_file():
            return label, _ANY, name, []
        raise SystemExit(
            f"benchmarks.quality: {name} is no set, configuration or folder with train.txt and test.txt; the "
            f"sets are {', '.join(TASKS)}"
        )
    task = TASKS[name]
    overrides = []
    if data is not None and task.source == "mirror":
        folder = Path(data)
        overrides = [f"data.mirror={folder if folder.is_dir() else folder.parent}"]
    elif data is not None and task.source is not None:
        overrides = [f"{task.source}={_unpacked(Path(data), root, task.source)}"]
    elif task.source not in (None, "mirror"):
        raise SystemExit(f"benchmarks.quality: give the file of {name} by --data")
    if name == "beauty" and overrides:
        items = Path(overrides[0].partition("=")[2]).with_name("items.csv")
        overrides.append(f"data.source.items.path={items}")
    return name, task, str(CONFIGS / f"{name}.yaml"), overrides


def _unpacked(data: Path, root: Path, source: str) -> Path:
    """Return the interactions of a zip that holds CSV files; other data as it is."""
    if source == "data.source.path" or data.suffix != ".zip":
        return data
    with zipfile.ZipFile(data) as archive:
        archive.extractall(root / "raw")
    files = sorted((root / "raw").glob("*.csv"))
    return next((file for file in files if file.name == "interactions.csv"), files[0])


def measured(config: Config) -> tuple[Metrics, dict[str, object]]:
    """Return metrics by ranker of the test split, ranked once, and facts of the run.

    Validation chooses the epoch of a training on the train split; the model that is measured is fitted on
    train and validation for as many, as the baselines are (with ``train.fit: train`` it is that of train).
    """
    from twotower.cluster.evaluate import evaluate
    from twotower.cluster.train import refit, train

    dataset = prepare(config)
    preflight.require(config, dataset, ("train", "evaluate"))
    began = time.perf_counter()
    chosen = train(config, dataset, fit="train")
    checkpoint = chosen if config.train.fit == "train" else refit(config, dataset, chosen, "known")
    seconds = time.perf_counter() - began
    report = json.loads((evaluate(config, dataset, checkpoint, None) / "report.json").read_text())
    facts = {
        "seed": config.seed,
        "train_s": round(seconds, 1),
        "epochs": len(report["history"]),
        "best_epoch": report["best_epoch"],
    }
    return report["metrics"], facts


def summary(
    task: Task, runs: Sequence[Metrics], seeds: Sequence[int]
) -> tuple[dict[str, float], list[list[object]]]:
    """Return the figures, means over seeds, and the table: others' rows, baselines, the model."""
    table: list[list[object]] = [["model", *task.shown, "source"]]
    table += [[name, *(f"{v:.4f}" for v in values), "published"] for name, values in task.published]
    rankers = sorted(runs[0], key=lambda name: (name == "model", name))
    for name in rankers:
        cells = []
        for metric in task.shown:
            values = [run[name][metric] for run in runs if name in run]
            spread = f" +- {statistics.stdev(values):.4f}" if name == "model" and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        ours = name == "model"
        source = f"here, {len(seeds)} seeds" if ours else "here"
        table.append(["twotower" if ours else name, *cells, source])
    figures: dict[str, float] = {}
    for figure in task.figures:
        found = [value for value in map(figure.of, runs) if value is not None]
        if found:
            figures[figure.key] = statistics.mean(found)
    if not task.figures:
        figures = {_key(m): statistics.mean(run["model"][m] for run in runs) for m in task.shown}
    return figures, table


def _key(metric: str) -> str:
    return metric.replace("@", "_at_")


def main() -> None:
    """Measure one set."""
    parser = argparse.ArgumentParser(description="Quality on a public set beside published results.")
    parser.add_argument("name", help=f"{', '.join(TASKS)}, a configuration, or a folder in LightGCN's format")
    parser.add_argument("--data", help="file or folder of the set, as it is downloaded")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides")
    options = measure.options(parser)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            name, task, path, overrides = settings_of(options.name, options.data, root)
            overrides = [f"storage.root={root}", *overrides, *options.set]
            if options.quick:
                overrides += task.quick
                options.seeds = options.seeds[:1]
            runs, facts = _runs(path, overrides, options.seeds)
        except TwotowerError as error:
            print(f"benchmarks.quality: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    figures, table = summary(task, runs, options.seeds)
    print(f"{name}: {task.protocol}")
    for fact in facts:
        print(json.dumps(fact))
    measure.finish(f"quality-{name}", figures, table, options.quick or bool(options.set))


def _runs(
    path: str, overrides: Sequence[str], seeds: Sequence[int]
) -> tuple[list[Metrics], list[dict[str, object]]]:
    from twotower.cluster.session import session

    runs, facts = [], []
    with session(load_config(path, list(overrides))):
        for seed in seeds:
            say(f"seed {seed}")
            metrics, fact = measured(load_config(path, [*overrides, f"seed={seed}"]))
            runs.append(metrics)
            facts.append(fact)
    return runs, facts


if __name__ == "__main__":
    main()

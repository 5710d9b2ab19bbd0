"""What each choice of the training does to quality: validation and test, three seeds.

    python -m benchmarks.effects --set data.mirror=/data/movielens
    python -m benchmarks.effects --config configs/beauty.yaml --set data.source.interactions=... --seeds 42

Every setting changes the one that is committed (configs/movielens.yaml where nothing else is named), trains
its epochs in one process and keeps the epoch that is best on validation. A difference is that of the mean
over seeds; its deviation is that of the difference over seeds, which share data, split and order of batches
with the base.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from twotower.config import Config, load_config, parse_config
from twotower.data.prepare import prepare
from twotower.errors import TwotowerError
from twotower.evaluation.holdout import evaluation_queries, query_inputs
from twotower.evaluation.metrics import MetricSums
from twotower.evaluation.ranking import rank_block
from twotower.model.features import QueryFeatures
from twotower.training.collectives import World
from twotower.training.loop import Trainer
from twotower.training.validation import encode_catalogue

BASE = Path(__file__).parents[1] / "configs" / "movielens.yaml"
SEEDS = (42, 43, 44)
MINED = "train.negatives.mined"
BSL = ["train.loss.kind=bsl"]
SETTINGS: dict[str, list[str]] = {
    "base": [],
    "logQ off": ["train.loss.log_q=0"],
    "logQ at half strength": ["train.loss.log_q=0.5"],
    "known positives not masked": ["train.loss.mask_known_positives=false"],
    "embeddings not normalised": ["model.normalize=false", "train.loss.temperature=1.0"],
    "layer norm in the towers": ["model.query_tower.norm=layer", "model.item_tower.norm=layer"],
    "batch norm in the towers": ["model.query_tower.norm=batch", "model.item_tower.norm=batch"],
    "no residual": ["model.query_tower.residual=none", "model.item_tower.residual=none"],
    "linear towers": ["model.query_tower.hidden=[]", "model.item_tower.hidden=[]"],
    "history: the first alone": ["history."],
    "history: every item": ["history.item_dropout=0"],
    "history: 80% of the items left out": ["history.item_dropout=0.8"],
    "history: mean": ["history.pooling=mean"],
    "history: recency, decay .95": ["history.pooling=recency", "history.decay=0.95"],
    "history: recency, decay .8": ["history.pooling=recency", "history.decay=0.8"],
    "history: attention": ["history.pooling=attention"],
    "history: transformer": ["history.pooling=transformer"],
    "a user id beside the history": ["user_id"],
    "temperature .05": ["train.loss.temperature=0.05"],
    "temperature .07": ["train.loss.temperature=0.07"],
    "temperature .14": ["train.loss.temperature=0.14"],
    "temperature .2": ["train.loss.temperature=0.2"],
    "temperature learned": ["train.loss.learn_temperature=true"],
    "batch 256": ["train.global_batch_size=256"],
    "batch 4096": ["train.global_batch_size=4096"],
    "1,024 uniform negatives more": ["train.negatives.uniform=1024"],
    "memory of 4,096 candidates": ["train.negatives.memory=4096", "train.negatives.memory_start=60"],
    "symmetric loss": ["train.loss.symmetric=true"],
    "bilateral softmax, power 1.1": [*BSL, "train.loss.bsl.negative_power=1.1"],
    "bilateral softmax, power 1.3": [*BSL, "train.loss.bsl.negative_power=1.3"],
    "bilateral softmax, power 1.1, positive side 10 times as warm": [
        *BSL,
        "train.loss.bsl.negative_power=1.1",
        "train.loss.bsl.positive_temperature=10",
    ],
    "binary cross-entropy": ["train.loss.kind=bce", "train.loss.bce.offset=-9"],
    "binary cross-entropy, not calibrated": [
        "train.loss.kind=bce",
        "train.loss.bce.offset=-9",
        "train.loss.bce.calibration=0",
    ],
    "top-k softmax": ["train.loss.kind=slatk", "train.loss.slatk.k=5", "train.loss.slatk.width=0.3"],
    "temperature learned at a rate of 1e-4": [
        "train.loss.learn_temperature=true",
        "train.loss.temperature_learning_rate=1e-4",
    ],
    "temperature .2 down to .07": [
        "train.loss.temperature=0.2",
        "train.loss.final_temperature=0.07",
    ],
    "half-life of 180 days": ["train.loss.recency_half_life_days=180"],
    "1 / sqrt of a user's examples": ["train.loss.activity_power=0.5"],
    "weight decay of tables .1": ["train.optimizer.table_weight_decay=0.1"],
    "4 mined negatives, ranks 11 to 110": [f"{MINED}.per_query=4"],
    "4 mined negatives, ranks 101 to 500": [
        f"{MINED}.per_query=4",
        f"{MINED}.skip=100",
        f"{MINED}.window=400",
    ],
    "4 mined, ranks 11 to 110, weight 10": [f"{MINED}.per_query=4", "train.negatives.own_weight=10"],
    "4 mined, ranks 11 to 110, weight 100": [f"{MINED}.per_query=4", "train.negatives.own_weight=100"],
}


def changed(path: str, overrides: Sequence[str], setting: Sequence[str]) -> Config:
    """Return a configuration with a setting.

    Args:
        path: the file.
        overrides: of its keys.
        setting: overrides too, of which ``history.KEY`` is of the first history, beside which no other stays,
            and ``user_id`` adds a feature.
    """
    ours = [change for change in setting if change.startswith(("history.", "user_id"))]
    values = load_config(path, [*overrides, *(c for c in setting if c not in ours)]).to_json()
    for change in ours:
        key, _, value = change.removeprefix("history.").partition("=")
        if key == "user_id":
            values["features"]["query"].append({"name": "user_id", "type": "id", "dim": 32})
            continue
        features = values["features"]["query"]
        first = next(feature for feature in features if feature["type"] == "history")
        values["features"]["query"] = [f for f in features if f is first or f["type"] != "history"]
        if key:
            first[key] = value if key == "pooling" else float(value)
    return parse_config(values)


def quality(config: Config) -> dict[str, float]:
    """Return validation and test metrics of one training in this process."""
    torch.set_num_threads(1)
    opened = prepare(config)
    trainer = Trainer(config, opened, World(), "train")
    while trainer.epoch < config.train.epochs and not trainer.finished:
        trainer.run_epoch()
    best = trainer.history[trainer.best_epoch - 1]
    trainer.model.load_state_dict(trainer.best_weights)
    trainer.model.eval()
    vectors = encode_catalogue(trainer.model, trainer.inputs, trainer.world)
    held = evaluation_queries(opened, config.evaluation.repeats, config.evaluation.max_users, config.seed)
    inputs = query_inputs(opened, held.user_rows)
    length = opened.schema.max_history
    rows, weights = inputs.histories.before(np.arange(len(held)), None, length)
    times = inputs.histories.times_before(np.arange(len(held)), None, length)
    features = QueryFeatures(opened.schema, inputs.profiles)(
        held.user_rows, inputs.columns, rows, weights, times
    )
    queries = trainer.model.encode_queries(features).numpy()
    sums = MetricSums([10, 100])
    sums.add(
        rank_block(queries, vectors, held.masked_offsets, held.masked_rows, 100),
        held.relevant_offsets,
        held.relevant_rows,
    )
    test = sums.result()
    assert best.validation_recall is not None
    assert best.validation_ndcg is not None
    k = config.train.validation.k
    return {
        f"validation recall@{k}": best.validation_recall,
        f"validation ndcg@{k}": best.validation_ndcg,
        "test recall@10": test["recall@10"],
        "test recall@100": test["recall@100"],
        "test ndcg@10": test["ndcg@10"],
    }


def _job(arguments: tuple[str, int, dict[str, Any]]) -> tuple[str, int, dict[str, float] | None]:
    name, seed, values = arguments
    try:
        return name, seed, quality(parse_config(values))
    except TwotowerError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return name, seed, None


def compared(values: Sequence[float], base: Sequence[float]) -> str:
    """Return a mean and, of the differences to the base, mean and deviation over seeds."""
    differences = [a - b for a, b in zip(values, base, strict=True)]
    deviation = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ({statistics.mean(differences):+.4f} +- {deviation:.4f})"


def main() -> None:
    """Train every setting with every seed."""
    parser = argparse.ArgumentParser(description="The effect of each choice on quality.")
    parser.add_argument("--config", default=str(BASE), help="the base (configs/movielens.yaml)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the base")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", metavar="WORD", help="settings whose name has one of these")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, of one thread each")
    options = measure.options(parser)
    quick, seeds = options.quick, options.seeds[:1] if options.quick else options.seeds
    words = options.only or [""]
    names = [name for name in SETTINGS if name == "base" or any(word in name for word in words)]
    names = names[:2] if quick else names
    found: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as root:
        own = [f"storage.root={root}", "train.num_workers=1", *(["train.epochs=1"] if quick else [])]
        base = load_config(options.config, [*options.set, *own])
        prepare(base)
        work = [
            (
                name,
                seed,
                changed(options.config, [*options.set, *own, f"seed={seed}"], SETTINGS[name]).to_json(),
            )
            for seed in seeds
            for name in names
        ]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for name, seed, metrics in pool.imap_unordered(_job, work):
                print(f"{name}, seed {seed}: {metrics}", file=sys.stderr, flush=True)
                if metrics is not None:
                    found.setdefault(name, {})[seed] = metrics
    names = [name for name in names if len(found.get(name, {})) == len(seeds)]
    metrics = list(found["base"][seeds[0]])

    def of(name: str, metric: str) -> list[float]:
        return [found[name][seed][metric] for seed in seeds]

    table: list[list[Any]] = [["setting", *metrics]]
    table += [[name, *(compared(of(name, m), of("base", m)) for m in metrics)] for name in names]
    figures = {
        f"{name}: {m}": statistics.mean(of(name, m)) - statistics.mean(of("base", m))
        for name in names[1:]
        for m in metrics
    }
    measure.finish(f"effects-{base.name}", figures, table, quick)


if __name__ == "__main__":
    main()

"""What was run, in names and numbers for a person: data, split, model, training, generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower.config import Config, SplitConfig
from twotower.config.splits import SPLIT_KINDS
from twotower.data.dataset import Dataset
from twotower.model.checkpoint import Checkpoint
from twotower.schema import FeatureSchema

_REPEATS = {
    "exclude": "What a user has had already is left out of the lists and is not relevant.",
    "include": "What a user has had already is ranked like any other item, and relevant when taken again.",
}


def split_rule(split: SplitConfig, repeats: str) -> str:
    """Return how interactions were held out and what counts, in sentences."""
    rule = SPLIT_KINDS[split.kind].rule.format(test=split.test_share, validation=split.validation_share)
    return f"{rule} {_REPEATS[repeats]}"


def about(
    config: Config, dataset: Dataset, checkpoint: Checkpoint, generation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return ``rule``, ``tables`` (by title, then by name) and ``index`` of what was evaluated.

    Args:
        config: of the evaluation.
        dataset: that was evaluated on.
        checkpoint: that was evaluated.
        generation: manifest of the one whose requests were timed; None where there is none.
    """
    counts, trained = dataset.counts, checkpoint.config
    splits = counts["splits"]
    source = {
        key: value
        for key, value in dataset.manifest["source"].items()
        if key in ("kind", "name", "num_tastes") and value is not None
    }
    split = SplitConfig.model_validate(dataset.manifest["config"].get("split", {}))
    history = checkpoint.course.get("history") or []
    fitted = {"train": "train", "known": "train and validation", "all": "every interaction"}
    tables: dict[str, dict[str, Any]] = {
        "Data": {
            "source": " ".join(str(value) for value in source.values()),
            "users": counts["users"],
            "items of the catalogue": counts["catalogue_items"],
            "interactions": counts["interactions"],
            "train positives": splits["train"],
            "validation positives": splits["validation"],
            "test positives": splits["test"],
            "split": split.kind,
        },
        "Model": {
            "embedding width": checkpoint.embedding_dim,
            **_features(checkpoint.schema),
            "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        },
        "Training": {
            "fitted on": fitted.get(str(checkpoint.manifest.get("fit")), "unknown"),
            "epochs": f"{len(history)} of {trained.train.epochs}",
            "kept epoch": checkpoint.course.get("best_epoch") or "unknown",
            "global batch": trained.train.batch_size(dataset.train_positives),
            "workers": trained.train.num_workers,
            "temperature at first": f"{trained.train.loss.temperature:g}",
            "seed": trained.seed,
        },
    }
    result: dict[str, Any] = {"rule": split_rule(split, config.evaluation.repeats), "tables": tables}
    if generation is not None:
        tables["Generation"] = {
            "id": generation["id"],
            "made": generation["created"],
            "items": generation["num_items"],
            "shards": len(generation["shards"]),
            "index": generation["index"]["factory"],
        }
        # How searches among some of the items are planned is no result.
        result["index"] = {key: value for key, value in generation["index"].items() if key != "filters"}
    return result


def _features(schema: FeatureSchema) -> dict[str, str]:
    return {
        f"{side} features": ", ".join(f"{f.spec.name} ({f.spec.type})" for f in features)
        for side, features in (("query", schema.query), ("item", schema.item))
    }

"""Users out of a trained model: the rows of their own in its tables become those of an unknown user.

So do those of items outside the catalogue that only they had. The towers, and rows that users share (hashed
ids, words of texts, values that others have too), were learned from everybody and stay; the next training
does without the forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from twotower.artefacts import link_or_copy, write_json
from twotower.data.forget import Erasure
from twotower.listing import listed_file
from twotower.model.checkpoint import (
    AGAIN,
    CONFIG,
    FEATURES,
    WEIGHTS,
    checkpoint_manifest,
    features_of,
    finish_checkpoint,
)
from twotower.model.checkpoint import KIND as KIND
from twotower.schema import UNKNOWN_ROW, FeatureSchema


def knows_users(checkpoint: Path) -> bool:
    """Return whether a model has embedding rows that are of one user each."""
    schema = features_of(checkpoint, checkpoint_manifest(checkpoint)["files"])
    return any(f.spec.rows_are("query") == "ids" for f in schema.query)


def forget_in_checkpoint(path: Path, directory: Path, erasure: Erasure) -> str:
    """Write a checkpoint without some users into a directory, the manifest last; returns its fingerprint.

    Args:
        path: of a checkpoint of the vocabulary of the erasure.
        directory: empty.
        erasure: what has to go.
    """
    manifest = checkpoint_manifest(path)
    files = manifest["files"]
    before = features_of(path, files)
    schema = erasure.schema(before)
    weights = safetensors.torch.load_file(listed_file(path, WEIGHTS, files, AGAIN))
    if _empty_rows(weights, before, schema, erasure):
        safetensors.torch.save_file(dict(sorted(weights.items())), directory / WEIGHTS)
    write_json(directory / FEATURES, schema.to_json())
    for name in (WEIGHTS, CONFIG):
        if not (directory / name).exists():
            link_or_copy(listed_file(path, name, files, AGAIN), directory / name)
    content = {k: v for k, v in manifest.items() if k not in ("kind", "schema_version")}
    if content["dataset_fingerprint"] == erasure.old_dataset:
        content["dataset_fingerprint"] = erasure.new_dataset
    return finish_checkpoint(directory, {**content, "vocabulary_hash": erasure.new_hash})


def _empty_rows(
    weights: Mapping[str, torch.Tensor], before: FeatureSchema, after: FeatureSchema, erasure: Erasure
) -> bool:
    """Overwrite rows in place; returns whether a table has any."""
    found = False
    own: dict[str, npt.NDArray[np.int64]] = {}
    for feature, new in zip(before.query, after.query, strict=True):
        name, rows_are = feature.spec.table_name("query"), feature.spec.rows_are("query")
        if rows_are == "ids":
            own[name] = erasure.rows
        elif rows_are == "items":
            own[name] = erasure.item_rows
        elif rows_are == "values":
            blank = [i for i, value in enumerate(new.values or []) if value != (feature.values or [])[i]]
            own[name] = np.array(blank, np.int64)
    for feature in before.item:
        if feature.spec.rows_are("item") in ("ids", "items"):
            own[feature.spec.table_name("item")] = erasure.item_rows
    for name, rows in own.items():
        if len(rows):
            table = weights[f"tables.{name}"]
            table[torch.from_numpy(rows + 1)] = table[UNKNOWN_ROW].clone()
            found = True
    return found

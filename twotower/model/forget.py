"""Users out of a trained model: the rows of their own in its tables become those of an unknown user.

The towers, and rows that users share (hashed ids, words of texts, values that others have too), were learned
from everybody and stay; the next training does without the forgotten.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from twotower.artefacts import MANIFEST, link_or_copy, read_manifest, write_json, write_manifest
from twotower.data.forget import Erasure
from twotower.hashing import sha256_file
from twotower.model.checkpoint import WEIGHTS
from twotower.model.towers import table_name
from twotower.schema import UNKNOWN_ROW, FeatureSchema, IdFeature

KIND = "checkpoint"


def knows_users(checkpoint: Path) -> bool:
    """Return whether a model has embedding rows that are of one user each."""
    return any(isinstance(f.spec, IdFeature) and f.spec.buckets is None for f in _schema_of(checkpoint).query)


def forget_in_checkpoint(path: Path, directory: Path, erasure: Erasure) -> str:
    """Write a checkpoint without some users into a directory, the manifest last; returns its fingerprint.

    Args:
        path: of a checkpoint of the vocabulary of the erasure.
        directory: empty.
        erasure: what has to go.
    """
    manifest = read_manifest(path, KIND)
    before = _schema_of(path)
    schema = erasure.schema(before)
    weights = safetensors.torch.load_file(path / WEIGHTS)
    if _empty_rows(weights, before, schema, erasure):
        safetensors.torch.save_file(dict(sorted(weights.items())), directory / WEIGHTS)
    write_json(directory / "features.json", schema.to_json())
    for file in path.iterdir():
        if file.name != MANIFEST and not (directory / file.name).exists():
            link_or_copy(file, directory / file.name)
    fingerprint = sha256_file(directory / WEIGHTS)
    content = {k: v for k, v in manifest.items() if k not in ("kind", "schema_version")}
    if content["dataset_fingerprint"] == erasure.old_dataset:
        content["dataset_fingerprint"] = erasure.new_dataset
    facts = {"fingerprint": fingerprint, "vocabulary_hash": erasure.new_hash}
    write_manifest(directory, KIND, {**content, **facts})
    return fingerprint


def _empty_rows(
    weights: Mapping[str, torch.Tensor], before: FeatureSchema, after: FeatureSchema, erasure: Erasure
) -> bool:
    """Overwrite rows in place; returns whether a table has any."""
    found = False
    for feature, new in zip(before.query, after.query, strict=True):
        if isinstance(feature.spec, IdFeature):
            # A hashed id is a sum of rows that other users read too.
            own = erasure.rows if feature.spec.buckets is None else np.zeros(0, np.int64)
        else:
            blank = [i for i, value in enumerate(new.values or []) if value != (feature.values or [])[i]]
            own = np.array(blank, np.int64)
        if len(own):
            table = weights[f"tables.{table_name('query', feature)}"]
            table[torch.from_numpy(own + 1)] = table[UNKNOWN_ROW].clone()
            found = True
    return found


def _schema_of(checkpoint: Path) -> FeatureSchema:
    return FeatureSchema.from_json(json.loads((checkpoint / "features.json").read_bytes()))

"""A trained model on disk: weights as safetensors, the feature schema, the configuration, the manifest last.

No pickle is read: a checkpoint may come from a shared bucket.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel
from safetensors import SafetensorError

from twotower.artefacts import read_manifest, write_json, write_manifest
from twotower.config import Config, stored_config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError, ArtefactMismatchError, UnavailableError, system_error
from twotower.hashing import sha256_file
from twotower.listing import STORED, Count, Files, Sha256, listed_file
from twotower.model.towers import TwoTower
from twotower.schema import FeatureSchema

KIND = "checkpoint"
WEIGHTS, FEATURES, CONFIG = "model.safetensors", "features.json", "config.json"
AGAIN = "Delete the checkpoint and train again, or copy it anew."


class CheckpointManifest(BaseModel):
    """The manifest of a checkpoint."""

    model_config = STORED

    fingerprint: Sha256
    dataset_fingerprint: str
    vocabulary_hash: str
    files: Files
    fit: str | None = None
    best_epoch: Count | None = None
    history: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    chosen: dict[str, Any] | None = None
    """History and best epoch of the training that a refit repeats with more of the data."""


class TrainedManifest(CheckpointManifest):
    """The manifest of a checkpoint that a training of this project left."""

    best_epoch: Count
    history: list[dict[str, Any]]
    metrics: dict[str, float | None]


def checkpoint_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a finished checkpoint.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    return read_manifest(path, KIND, CheckpointManifest)


def features_of(path: Path, files: Mapping[str, Any]) -> FeatureSchema:
    """Return the features of a checkpoint.

    Args:
        path: the directory.
        files: of its manifest.

    Raises:
        ArtefactError: they can not be read, or are not those of the manifest.
    """
    return FeatureSchema.parse(_listed(path, FEATURES, files), str(path / FEATURES), AGAIN)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with everything that is needed to feed it."""

    path: Path
    model: TwoTower
    schema: FeatureSchema
    config: Config
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        return str(self.manifest["fingerprint"])

    @property
    def course(self) -> dict[str, Any]:
        """``history`` and ``best_epoch`` of the training whose epochs were compared on validation."""
        return self.manifest.get("chosen") or self.manifest

    @property
    def dataset_fingerprint(self) -> str:
        """Fingerprint of the dataset it was trained on."""
        return str(self.manifest["dataset_fingerprint"])

    @property
    def vocabulary_hash(self) -> str:
        """Hash of the vocabularies that its embedding rows stand for."""
        return str(self.manifest["vocabulary_hash"])

    @property
    def embedding_dim(self) -> int:
        """Width of query and candidate embeddings."""
        return self.model.embedding_dim

    @classmethod
    def open(cls, path: Path | str, device: str = "cpu", known: str | None = None) -> Checkpoint:
        """Return the checkpoint of a directory, its model in evaluation mode.

        Only files that its manifest lists are read, and only where they are as it says.

        Args:
            path: the directory.
            device: of torch.
            known: SHA-256 of its weights, where they have just been read; they are not read twice then.

        Raises:
            ArtefactError: the directory is no finished checkpoint, or a file of it is damaged or can not be
                read now; ``may_pass`` tells.
            MemoryError: there is no room for it now.
        """
        path = Path(path)
        manifest = checkpoint_manifest(path)
        files = manifest["files"]
        schema = features_of(path, files)
        config = stored_config(_listed(path, CONFIG, files), str(path / CONFIG), AGAIN)
        weights = listed_file(path, WEIGHTS, files, AGAIN)
        try:
            found = known or sha256_file(weights)
        except OSError as error:
            raise ArtefactError(f"checkpoint {path} is damaged: {error}. Train again.") from None
        if found != manifest["fingerprint"] or found != files[WEIGHTS]["sha256"]:
            raise ArtefactError(
                f"{weights} has SHA-256 {found[:16]}..., its manifest says "
                f"{manifest['fingerprint'][:16]}...: the file is damaged. Train again, or copy it anew."
            )
        with _memory_errors(weights):
            tensors = _tensors(weights)
            model = _model(path, schema, config)
        for name, tensor in model.unknown_items.state_dict(prefix="unknown_items.").items():
            if name not in tensors:
                # Of an earlier release, which had none.
                tensors[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:500]
            raise ArtefactError(f"{weights} does not fit its configuration: {reason}") from None
        return cls(path, model.to(device).eval(), schema, config, manifest)

    def file(self, name: str) -> Path:
        """Return the path of a file that its manifest lists.

        Raises:
            ArtefactError: it lists no such file.
        """
        return listed_file(self.path, name, self.manifest["files"], AGAIN)

    def require_dataset(self, dataset: Dataset) -> None:
        """Check that embedding rows and dataset rows mean the same ids.

        Raises:
            ArtefactMismatchError: the vocabularies differ.
        """
        if dataset.vocabulary_hash != self.vocabulary_hash:
            raise ArtefactMismatchError(
                f"checkpoint {self.path} was trained on vocabulary {self.vocabulary_hash}, "
                f"dataset {dataset.path} has {dataset.vocabulary_hash}. Train on this dataset, "
                f"or give the dataset {self.dataset_fingerprint} that it was trained on."
            )


def _listed(path: Path, name: str, files: Mapping[str, Any]) -> bytes:
    """Return the content of a small file of a checkpoint, checked against its manifest."""
    file = listed_file(path, name, files, AGAIN)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ArtefactError(f"checkpoint {path} is damaged: {error}. {AGAIN}") from None
    if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
        raise ArtefactError(f"{file} is not as its manifest says: it was changed or damaged. {AGAIN}")
    return data


def _model(path: Path, schema: FeatureSchema, config: Config) -> TwoTower:
    """Return a model whose tensors take no memory: those of the file take their places."""
    try:
        with torch.device("meta"):
            return TwoTower(schema, config.model, config.train.loss.temperature, seed=None)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ArtefactError(
            f"{path}: its features and its configuration are of no model ({error!r}). {AGAIN}"
        ) from None


def _tensors(weights: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name: tables in its own pages, which processes share until they write.

    What is multiplied is copied: the last bits of a product depend on how its factors lie in memory.
    """
    tensors = _loaded(weights)
    return {name: t if name.startswith("tables.") else t.clone() for name, t in tensors.items()}


def _loaded(weights: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, and tell what is damaged from what the system refuses now."""
    try:
        return safetensors.torch.load_file(weights)
    except SafetensorError as error:
        raise ArtefactError(f"{weights} is damaged ({error}). Train again, or copy it anew.") from None
    except FileNotFoundError as error:
        # So safetensors calls whatever it can not open.
        raise UnavailableError(f"{weights} can not be read now ({error}); try again") from None
    except RuntimeError as error:
        refused = system_error(error)
        if refused is None:
            raise
        raise UnavailableError(f"{weights} can not be read now ({refused.strerror}); try again") from None


@contextlib.contextmanager
def _memory_errors(weights: Path) -> Iterator[None]:
    """Raise as a MemoryError what torch raises where it gets no memory: a RuntimeError, as for any defect."""
    try:
        yield
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise MemoryError(f"there is no memory for the model of {weights}: {error}") from None


def weights_of(model: TwoTower) -> dict[str, torch.Tensor]:
    """Return the model's tensors by name, on the CPU and contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def write_checkpoint(
    directory: Path, weights: dict[str, torch.Tensor], dataset: Dataset, config: Config, facts: dict[str, Any]
) -> None:
    """Write a checkpoint's files into an existing directory, the manifest last.

    Args:
        directory: where to write.
        weights: from ``weights_of``.
        dataset: what it was trained on.
        config: the resolved configuration.
        facts: further content of the manifest, such as the training history.
    """
    # Sorted, so that equal weights give equal bytes.
    safetensors.torch.save_file(dict(sorted(weights.items())), directory / WEIGHTS)
    write_json(directory / FEATURES, dataset.schema.to_json())
    write_json(directory / CONFIG, config.to_stored())
    content = {"dataset_fingerprint": dataset.fingerprint, "vocabulary_hash": dataset.vocabulary_hash}
    finish_checkpoint(directory, {**content, **facts})


def finish_checkpoint(directory: Path, content: dict[str, Any]) -> str:
    """Write the manifest of a checkpoint whose files are there; returns its fingerprint.

    Args:
        directory: with the weights, the features and the configuration.
        content: of the manifest, but the fingerprint and the files.
    """
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)}
        for name in (CONFIG, FEATURES, WEIGHTS)
    }
    fingerprint = str(files[WEIGHTS]["sha256"])
    write_manifest(directory, KIND, {**content, "fingerprint": fingerprint, "files": files})
    return fingerprint

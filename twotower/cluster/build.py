"""A checkpoint and a dataset to a generation: encode, build each shard on Ray, measure, write.

Workers write into a work folder that is called after the generation; the driver moves what is complete. A
build that was killed leaves the folder, and the next build of the same generation goes on with the parts and
shards that are missing in it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from twotower.artefacts import building, fingerprint, finished, locked
from twotower.cluster.encode import encode_catalogue
from twotower.cluster.failures import plain_errors
from twotower.cluster.priority import giving_way
from twotower.cluster.session import session, wants_gpu
from twotower.config import Config
from twotower.data.attributes import attribute_table
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError, SystemFaultError, TwotowerError
from twotower.index.choice import choose, num_shards
from twotower.index.gpu import faiss_has_gpus
from twotower.index.gpu_build import require_gpu
from twotower.index.parts import Part
from twotower.index.spec import CAGRA, builds_on_gpu, empty_index
from twotower.model.checkpoint import Checkpoint
from twotower.progress import bar, say
from twotower.retrieval.catalogue import Catalogue
from twotower.retrieval.generation import Generation
from twotower.retrieval.manifest import KIND, GenerationManifest
from twotower.retrieval.promise import describe, measure
from twotower.retrieval.shards import shard_folders, train_shards, write_shard
from twotower.retrieval.store import Store
from twotower.retrieval.writing import finish, write_tables

_VERSION = 2
"""Changes whenever the same inputs give another generation."""


def generation_id(config: Config, dataset: Dataset, checkpoint: Checkpoint) -> str:
    """Return the name of the generation of these inputs: the same inputs, the same name."""
    return fingerprint(
        {
            "dataset": dataset.fingerprint,
            "checkpoint": checkpoint.fingerprint,
            "index": config.index.model_dump(mode="json"),
            "seed": config.seed,
            "version": _VERSION,
        }
    )


def build_generation(config: Config, dataset: Dataset, checkpoint_dir: Path) -> Path:
    """Build the generation of a checkpoint over a dataset's catalogue and return its directory.

    Args:
        config: the configuration.
        dataset: catalogue, users and all their interactions; all nodes must reach its directory.
        checkpoint_dir: trained on the dataset's vocabulary; all nodes must reach it.

    Returns:
        ``config.store / "generations" / ID``. It is not published. The same inputs are built once.

    Raises:
        ConfigError: ``index.factory`` can not hold this catalogue, or an attribute is not in it.
        ArtefactMismatchError: the checkpoint is of another vocabulary.
        ArtefactError: encoding or building lost an item.
    """
    checkpoint = Checkpoint.open(checkpoint_dir)
    checkpoint.require_dataset(dataset)
    choice = choose(config.index, dataset.num_catalogue_items, checkpoint.embedding_dim)
    empty_index(choice.factory, checkpoint.embedding_dim)
    attribute_table(dataset.item_schema.empty_table(), config.index.attributes)
    say(f"index {choice.factory}: {choice.reason}")
    name = generation_id(config, dataset, checkpoint)
    directory = Store(config.store).path(name)
    with locked(config.store / ".work" / f"{name}.lock"):
        # A finished generation may be in use: it is never replaced.
        if finished(directory, KIND, GenerationManifest):
            say(f"generation {name} is there already")
            return directory
        with building(directory) as partial, work_folder(config.store, name) as work, session(config):
            say("users and tables")
            write_tables(partial, config, dataset, checkpoint)
            facts = build_index(config, Catalogue.of(dataset), checkpoint, partial, work)
            created = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
            finish(partial, name, created, dataset, checkpoint, facts)
    say(f"generation {name}: {dataset.num_catalogue_items:,} items in {facts['num_shards']} shards")
    return directory


def build_index(
    config: Config, catalogue: Catalogue, checkpoint: Checkpoint, directory: Path, work: Path
) -> dict[str, Any]:
    """Encode a catalogue, build its shards into an unfinished generation, and measure them.

    Args:
        config: for the index and the cluster. Ray must be initialised.
        catalogue: all its items are indexed.
        checkpoint: all nodes must reach its directory.
        directory: of the generation, with its users and items; gets ``shards``.
        work: folder that all nodes reach; whole parts and shards that are there are taken as they are.

    Returns:
        ``index`` of the manifest.

    Raises:
        ConfigError: the index can not be built of these items, or only on a GPU and there is none.
        ArtefactError: encoding or building lost an item.
    """
    factory = choose(config.index, catalogue.num_items, checkpoint.embedding_dim).factory
    count = num_shards(config.index, catalogue.num_items)
    # Before the hours that encoding may take.
    on_gpu = _on_gpu(config, factory, checkpoint.embedding_dim)
    parts = encode_catalogue(checkpoint.path, catalogue, work / "parts", config, count)
    build_shards(config, catalogue, checkpoint, parts, work / "shards", factory, on_gpu)
    threads = max(1, int(config.cluster.cpus_per_encoder))
    shard_folders(work / "shards", count)
    # The generation has no manifest yet, and its users are there.
    facts = measure(config, Generation(directory, {}), checkpoint, parts, work / "shards", threads)
    for line in describe(facts):
        say(line)
    os.replace(work / "shards", directory / "shards")
    return facts


def build_shards(
    config: Config,
    catalogue: Catalogue,
    checkpoint: Checkpoint,
    parts: list[Part],
    directory: Path,
    factory: str,
    on_gpu: bool = False,
) -> None:
    """Build and write every shard, one Ray task each.

    Args:
        config: for the index and what a task reserves.
        catalogue: for the item tables.
        checkpoint: that encoded the parts.
        parts: of the whole catalogue.
        directory: gets a folder for each shard; all nodes must reach it under this path. Shards that an
            earlier run wrote whole are taken as they are.
        factory: FAISS factory string of each shard.
        on_gpu: let each task reserve a GPU, so that the shards spread over those of the cluster.

    Raises:
        ConfigError: the index can not be built from a shard.
        ArtefactError: the shards do not hold as many items as the catalogue.
    """
    count = num_shards(config.index, catalogue.num_items)
    cpus = config.cluster.cpus_per_encoder
    threads = max(1, int(cpus))
    reserved: Any = ray.remote(num_cpus=cpus, num_gpus=int(on_gpu))
    trained = None
    if count > 1:
        # Once for all shards, so that they can be searched as one.
        path = directory.absolute().with_name("trained.faiss")
        with plain_errors():
            training = reserved(giving_way(train_shards))
            points = config.index.train_points
            trained = ray.get(
                training.remote(parts, factory, points, config.seed, str(path), threads, on_gpu)
            )
    task = reserved(giving_way(write_shard))
    pending = [
        task.remote(
            parts,
            number,
            factory,
            [str(Path(path).absolute()) for path in catalogue.paths],
            ["title", *checkpoint.schema.item_columns],
            config.index.attributes,
            checkpoint.fingerprint,
            str(directory.absolute() / f"{number:05d}"),
            threads,
            trained,
            on_gpu,
        )
        for number in range(count)
    ]
    rows = 0
    with plain_errors(), bar(count, "index", unit="shards") as progress:
        try:
            while pending:
                done, pending = ray.wait(pending)
                rows += sum(ray.get(done))
                progress.update(len(done))
        finally:
            _end(pending)
    if rows != catalogue.num_items:
        raise ArtefactError(
            f"the shards hold {rows} items, the catalogue has {catalogue.num_items}; build again"
        )


def _on_gpu(config: Config, factory: str, dim: int) -> bool:
    """Return whether the tasks of the shards reserve GPUs; what is left to CPUs although there are is said.

    Raises:
        ConfigError: the index can only be built on a GPU and there is none.
    """
    gpu = wants_gpu(config)
    if factory == CAGRA:
        require_gpu(gpu)
    if not gpu or factory == "Flat":
        return False
    if not faiss_has_gpus():
        say("FAISS is its CPU build here: the index is built on CPUs (make setup FLAVOUR=gpu)")
        return False
    if not builds_on_gpu(empty_index(factory, dim)):
        say(f"index {factory} is built on CPUs: a GPU takes over none of it")
        return False
    return True


def _end(tasks: list[ray.ObjectRef]) -> None:
    """Cancel tasks and wait until they are over, so that none writes into a folder that is being removed."""
    for task in tasks:
        ray.cancel(task)
    for task in tasks:
        with contextlib.suppress(ray.exceptions.RayError, TwotowerError):
            ray.get(task)


@contextlib.contextmanager
def work_folder(store: Path, name: str) -> Iterator[Path]:
    """Yield the work folder of a generation, with what a run that was killed left in it.

    It is removed at the end, also where its content is to blame for an error; what befalls the cluster leaves
    it for the next run.
    """
    folder = (store / ".work").absolute() / f"{name}-build"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except SystemFaultError:
        raise
    except TwotowerError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)

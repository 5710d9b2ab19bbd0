"""A checkpoint and a dataset to a generation: encode, build each shard, measure, write.

What a runner does writes into a work folder that is called after the generation; what is complete is moved. A
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

from twotower.artefacts import building, fingerprint, finished, locked
from twotower.config import Config
from twotower.data.attributes import attribute_table
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError, SystemFaultError, TwotowerError
from twotower.generations.generation import Generation
from twotower.generations.manifest import KIND, GenerationManifest
from twotower.generations.shards import shard_folders, train_shards, write_shard
from twotower.generations.store import Store
from twotower.generations.writing import finish, write_tables
from twotower.index.choice import choose, num_shards
from twotower.index.gpu import faiss_has_gpus
from twotower.index.gpu_build import require_gpu
from twotower.index.parts import Part
from twotower.index.spec import CAGRA, builds_on_gpu, empty_index
from twotower.lifecycle.catalogue import Catalogue
from twotower.lifecycle.measurement import describe, measure
from twotower.model.checkpoint import Checkpoint
from twotower.pipeline.encode import encode_catalogue
from twotower.pipeline.runner import Begin, Runner, one_process
from twotower.progress import bar, say

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


def build_generation(
    config: Config, dataset: Dataset, checkpoint_dir: Path, begin: Begin = one_process
) -> Path:
    """Build the generation of a checkpoint over a dataset's catalogue and return its directory.

    Args:
        config: the configuration.
        dataset: catalogue, users and all their interactions; all workers must reach its directory.
        checkpoint_dir: trained on the dataset's vocabulary; all workers must reach it.
        begin: yields who does the work; this process where it is not given.

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
        with (
            building(directory) as partial,
            work_folder(config.store, name) as work,
            begin(config) as runner,
        ):
            say("users and tables")
            write_tables(partial, config, dataset, checkpoint)
            facts = build_index(config, Catalogue.of(dataset), checkpoint, partial, work, runner)
            created = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
            finish(partial, name, created, dataset, checkpoint, facts)
    say(f"generation {name}: {dataset.num_catalogue_items:,} items in {facts['num_shards']} shards")
    return directory


def build_index(
    config: Config,
    catalogue: Catalogue,
    checkpoint: Checkpoint,
    directory: Path,
    work: Path,
    runner: Runner,
) -> dict[str, Any]:
    """Encode a catalogue, build its shards into an unfinished generation, and measure them.

    Args:
        config: for the index, and the batches and threads of the work.
        catalogue: all its items are indexed.
        checkpoint: all workers must reach its directory.
        directory: of the generation, with its users and items; gets ``shards``.
        work: folder that all workers reach; whole parts and shards that are there are taken as they are.
        runner: does the work.

    Returns:
        ``index`` of the manifest.

    Raises:
        ConfigError: the index can not be built of these items, or only on a GPU and there is none.
        ArtefactError: encoding or building lost an item.
    """
    factory = choose(config.index, catalogue.num_items, checkpoint.embedding_dim).factory
    count = num_shards(config.index, catalogue.num_items)
    # Before the hours that encoding may take.
    on_gpu = _on_gpu(runner.gpu, factory, checkpoint.embedding_dim)
    parts = encode_catalogue(checkpoint.path, catalogue, work / "parts", config, count, runner)
    build_shards(config, catalogue, checkpoint, parts, work / "shards", factory, runner, on_gpu)
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
    runner: Runner,
    on_gpu: bool = False,
) -> None:
    """Build and write every shard, one call of the runner each.

    Args:
        config: for the index and the threads of a call.
        catalogue: for the item tables.
        checkpoint: that encoded the parts.
        parts: of the whole catalogue.
        directory: gets a folder for each shard; all workers must reach it under this path. Shards that an
            earlier run wrote whole are taken as they are.
        factory: FAISS factory string of each shard.
        runner: builds.
        on_gpu: let each call have a GPU, so that the shards spread over those that there are.

    Raises:
        ConfigError: the index can not be built from a shard.
        ArtefactError: the shards do not hold as many items as the catalogue.
    """
    count = num_shards(config.index, catalogue.num_items)
    threads = max(1, int(config.cluster.cpus_per_encoder))
    trained = None
    if count > 1:
        # Once for all shards, so that they can be searched as one.
        path = directory.absolute().with_name("trained.faiss")
        points = config.index.train_points
        trained = runner.start(
            train_shards, parts, factory, points, config.seed, str(path), threads, on_gpu, gpu=on_gpu
        ).result()
    calls = [
        runner.start(
            write_shard,
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
            gpu=on_gpu,
        )
        for number in range(count)
    ]
    rows = 0
    with (
        contextlib.closing(runner.as_finished(calls)) as numbers,
        bar(count, "index", unit="shards") as progress,
    ):
        for number in numbers:
            rows += number
            progress.update()
    if rows != catalogue.num_items:
        raise ArtefactError(
            f"the shards hold {rows} items, the catalogue has {catalogue.num_items}; build again"
        )


def _on_gpu(gpu: bool, factory: str, dim: int) -> bool:
    """Return whether shards are built on GPUs; what is left to CPUs although there are GPUs is said.

    Raises:
        ConfigError: the index can only be built on a GPU and there is none.
    """
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


@contextlib.contextmanager
def work_folder(store: Path, name: str) -> Iterator[Path]:
    """Yield the work folder of a generation, with what a run that was killed left in it.

    It is removed at the end, also where its content is to blame for an error; what befalls the machine leaves
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

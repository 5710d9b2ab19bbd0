"""A generation that updates changed, built anew: all its items are in base shards, the rest stays as it is.

Nothing is trained and no raw data is read: items come from the generation's own tables and are encoded by
its own item tower, so that answers change by what an index rounds and by nothing else.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.artefacts import building, fingerprint, finished, link_or_copy, locked, write_manifest
from twotower.cluster.runner import on_ray
from twotower.config import Config
from twotower.data.dataset import ITEM_ROW
from twotower.generations.files import KIND, TOMBSTONES, list_files
from twotower.generations.generation import Generation
from twotower.generations.manifest import GenerationManifest
from twotower.generations.store import Store
from twotower.generations.writing import built_shards
from twotower.lifecycle.catalogue import Catalogue
from twotower.pipeline.build import build_index, work_folder
from twotower.progress import say

_VERSION = 1
"""Changes whenever the same generation is compacted to another one."""
_FILE_ROWS = 1_000_000
_GROUP_ROWS = 65_536


def compact(config: Config, store: Store, generation_id: str) -> Path:
    """Build a generation anew from its own items, and return the directory of the result.

    The index is chosen and measured as the configuration of the last full build says, for the items that
    there are now.

    Args:
        config: for the cluster, and the threads that searches are timed with.
        store: holds the generation, and gets the result, which is not published.
        generation_id: of a generation; one without updates is returned as it is.

    Raises:
        ArtefactError: the generation is damaged, or encoding or building lost an item.
        ArtefactMismatchError: its towers are not those that encoded its shards.
        ConfigError: the index can not hold the items that there are now.
    """
    base = Generation.open(store.fetch(generation_id))
    if base.manifest["delta"] is None:
        say(f"generation {generation_id} has no updates to compact")
        return base.path
    checkpoint = base.checkpoint()
    base.require_checkpoint(checkpoint)
    built = base.config
    settings = config.model_copy(update={"index": built.index, "seed": built.seed})
    name = fingerprint({"compacted": base.id, "version": _VERSION})
    directory = store.path(name)
    with locked(store.root / ".work" / f"{name}.lock"):
        if finished(directory, KIND, GenerationManifest):
            say(f"generation {name} is there already")
            return directory
        with (
            building(directory) as partial,
            work_folder(store.root, name) as work,
            on_ray()(config) as runner,
        ):
            shared = [n for n in base.manifest["files"] if n != TOMBSTONES and not n.startswith("shards/")]
            for file in shared:
                link_or_copy(base.file(file), partial / file)
            catalogue = write_catalogue(base, work / "items")
            index = build_index(settings, catalogue, checkpoint, partial, work, runner)
            write_manifest(
                partial,
                KIND,
                {
                    **{
                        k: v
                        for k, v in base.manifest.items()
                        if k not in ("kind", "schema_version", "replaces")
                    },
                    "id": name,
                    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
                    "num_items": catalogue.num_items,
                    "shards": built_shards(partial),
                    "delta": None,
                    "files": list_files(partial),
                    "index": index,
                },
            )
    say(f"generation {name}: {catalogue.num_items:,} items in {index['num_shards']} shards, compacted")
    return directory


def write_catalogue(generation: Generation, directory: Path) -> Catalogue:
    """Write the items that a generation can answer as Parquet files, ascending by item row.

    Args:
        generation: whose items.
        directory: created; files that are there already are replaced by the same.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = generation.answerable_rows()
    paths = []
    for start in range(0, len(rows), _FILE_ROWS):
        path = directory / f"items-{start:010d}.parquet"
        _write(path, generation, rows[start : start + _FILE_ROWS])
        paths.append(str(path))
    return Catalogue(tuple(paths), len(rows), len(generation.item_ids))


def _write(path: Path, generation: Generation, rows: np.ndarray) -> None:
    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(rows), _GROUP_ROWS):
            some = rows[start : start + _GROUP_ROWS]
            yield generation.items.table(some).append_column(ITEM_ROW, pa.array(some))

    temporary = path.with_name(f".{path.name}.tmp")
    schema = generation.items.schema.append(pa.field(ITEM_ROW, pa.int64()))
    with pq.ParquetWriter(temporary, schema) as writer:
        for table in tables():
            writer.write_table(table)
    temporary.replace(path)

"""The top k of every user, offline, on Ray: actors with a retriever each write Parquet parts.

Users are read from the generation and lists are written by the actors, so nothing large passes through the
driver. A part is written whole or not at all and has a name that follows from its users: a run that was
killed goes on with the parts that are missing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from twotower.artefacts import building, fingerprint, has_manifest, read_manifest, write_json, write_manifest
from twotower.cluster.native_log import without_native_log
from twotower.cluster.pool import pin_threads, ranges, work_through
from twotower.cluster.session import session
from twotower.config import Config
from twotower.data.vocabulary import FORGOTTEN, Vocabulary
from twotower.errors import ArtefactError
from twotower.progress import bar, say
from twotower.retrieval.generation import Generation
from twotower.retrieval.query import Query
from twotower.retrieval.retriever import Retriever

KIND = "recommendations"
_USERS = b"num_users"
_VERSION = 1
"""Changes whenever the same inputs give other parts."""

PARTS = "parts"
"""Folder of the Parquet files, which hold nothing else: any reader takes the folder as one table."""

_AT_ONCE = 256
"""Users of one batch of the retriever."""

SCHEMA = pa.schema(
    [("user_id", pa.string()), ("rank", pa.int32()), ("item_id", pa.string()), ("score", pa.float32())]
)
"""Columns of the parts; ranks count from 1."""


def recommend(config: Config, generation_dir: Path) -> Path:
    """Write the top k of every user of a generation, and return the directory.

    Args:
        config: the configuration; ``recommend.k`` and ``recommend.exclude_seen``.
        generation_dir: a finished generation.

    Returns:
        ``config.recommendations / ID`` with ``parts/part-*.parquet`` (columns of ``SCHEMA``, users in row
        order, best item first). The same inputs are recommended once.

    Raises:
        ArtefactError: the generation is damaged, or the parts do not hold every user once.
    """
    generation_dir = Path(generation_dir).absolute()
    manifest = read_manifest(generation_dir, "generation")
    section = config.recommend.model_dump(mode="json")
    inputs = {"generation": manifest["id"], "recommend": section, "version": _VERSION}
    directory = config.recommendations / f"{manifest['id']}-{fingerprint(inputs)[:8]}"
    if has_manifest(directory):
        say(f"recommendations {directory.name} are there already")
        return directory
    Generation.open(generation_dir, verify=True)
    num_users = len(Vocabulary.open(generation_dir / "user_ids.arrow"))
    parts = {_name(**part): part for part in ranges(num_users, config)}
    with building(directory, keep_partial=True) as partial:
        folder = partial / PARTS
        folder.mkdir(exist_ok=True)
        # Files of another way to share out the users, and of writes that did not end.
        for stray in [path for path in folder.iterdir() if path.name not in parts]:
            stray.unlink()
        missing = [part for name, part in parts.items() if not (folder / name).is_file()]
        settings = {"generation": str(generation_dir), "out": str(folder.absolute()), **section}
        with without_native_log(), bar(num_users, "recommend", unit="users") as progress:
            progress.update(num_users - sum(part["stop"] - part["start"] for part in missing))
            if missing:
                with session(config):
                    for fact in work_through(RecommendUsers, settings, missing, config, gpu=False):
                        progress.update(fact["users"])
        num_rows = sum(_checked(folder / name, **part, k=config.recommend.k) for name, part in parts.items())
        write_json(partial / "config.json", config.to_json())
        counts = {"num_users": num_users, "num_rows": num_rows, "num_parts": len(parts)}
        write_manifest(partial, KIND, {"id": directory.name, **inputs, **counts})
    say(f"{num_rows:,} recommendations for {num_users:,} users")
    return directory


class RecommendUsers:
    """Recommends to ranges of users; an actor of the pool."""

    def __init__(
        self, generation: str, out: str, k: int, exclude_seen: bool, device: str, threads: int
    ) -> None:
        """Open the generation, which the driver has verified.

        Args:
            generation: directory.
            out: folder of the parts.
            k: items for each user.
            exclude_seen: leave out what the user has already had.
            device: taken as given; retrievers run on the CPU.
            threads: CPU threads.
        """
        pin_threads(threads)
        path = Path(generation)
        self._retriever = Retriever.open(path, threads=threads, verify=False)
        self._user_ids = Vocabulary.open(path / "user_ids.arrow")
        self._out = Path(out)
        self._k = k
        self._exclude_seen = exclude_seen

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the part of the range in the first row and return its counts."""
        start, stop = batch["start"][0].as_py(), batch["stop"][0].as_py()
        tables = [
            self._lists(np.arange(first, min(first + _AT_ONCE, stop)))
            for first in range(start, stop, _AT_ONCE)
        ]
        table = pa.concat_tables(tables)
        write_part(self._out / _name(start, stop), table, stop - start)
        return pa.table({"users": [stop - start], "rows": [len(table)]})

    def _lists(self, user_rows: NDArray[np.int64]) -> pa.Table:
        # Rows of users who were forgotten have no id.
        ids = [user_id for user_id in self._user_ids.ids(user_rows) if user_id != FORGOTTEN]
        queries = [Query(user_id=user_id, k=self._k, exclude_seen=self._exclude_seen) for user_id in ids]
        answers = self._retriever.retrieve_batch(queries)
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        for user_id, answer in zip(ids, answers, strict=True):
            columns["user_id"] += [user_id] * len(answer.items)
            columns["rank"] += range(1, len(answer.items) + 1)
            columns["item_id"] += [item["item_id"] for item in answer.items]
            columns["score"] += [item["score"] for item in answer.items]
        return pa.table(columns, schema=SCHEMA)


def write_part(path: Path, table: pa.Table, num_users: int) -> None:
    """Write a part so that a reader sees a whole file or none; its footer says how many users it is of."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    table = table.replace_schema_metadata({_USERS: str(num_users).encode()})
    with open(temporary, "wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _name(start: int, stop: int) -> str:
    return f"part-{start:010d}-{stop:010d}.parquet"


def _checked(path: Path, start: int, stop: int, k: int) -> int:
    """The rows of a part that is there and of the right users."""
    try:
        footer = pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ArtefactError(
            f"{path} can not be read ({error}); delete {path.parent} and recommend again"
        ) from None
    users = int((footer.metadata or {}).get(_USERS, b"-1"))
    if users != stop - start or footer.num_rows > users * k:
        raise ArtefactError(
            f"{path} holds {footer.num_rows} rows of {users} users; it must hold at most {k} for each of "
            f"{stop - start}. Delete {path.parent} and recommend again"
        )
    return int(footer.num_rows)

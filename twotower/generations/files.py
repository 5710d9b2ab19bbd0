"""The files of a generation: what its manifest says of them, and those of a shard that are no index."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from twotower.artefacts import MANIFEST, remove, write_json
from twotower.config import AttributeConfig
from twotower.data.attributes import attribute_table
from twotower.errors import ArtefactError, DamagedError
from twotower.generations.manifest import BASE as BASE
from twotower.generations.manifest import DELTA as DELTA
from twotower.generations.manifest import KIND as KIND
from twotower.generations.manifest import ShardFacts, generation_manifest
from twotower.hashing import sha256_file
from twotower.jsonfiles import check_shape, read_json
from twotower.listing import listed_file

FACTS = "shard.json"
"""The last file of a shard that is written."""
INDEX, ITEM_ROWS = "index.faiss", "item_rows.npy"
"""The vectors of a shard, and the item row of each."""
ITEMS, ATTRIBUTES = "items.arrow", "attributes.arrow"
"""Tables of a shard: what people read about its items, and what queries filter by."""
SHARD_FILES = (INDEX, ITEM_ROWS, ITEMS, ATTRIBUTES, FACTS)
"""All that a shard may have."""
CONFIG, ITEM_IDS = "config.json", "item_ids.arrow"
"""What the generation was built with, and the ids of its items by item row."""
TOMBSTONES = "tombstones.npy"
"""Item rows of base shards that updates deleted or replaced."""
HISTORY = ("offsets", "item_rows", "times", "weights")
"""Arrays of the users' histories."""
HISTORY_CUT = "users/history_cut.npy"
"""Of each user whether earlier interactions were left out."""
COLUMN, PROFILE = "column-", "profile-"
"""How the names of files of static columns and of profiles begin."""
AGAIN = "Delete the generation and build it again."


def column_file(feature: str) -> str:
    """Return the name of the file with a static column of the users."""
    return f"{COLUMN}{quote(feature, safe='')}.npy"


def profile_file(feature: str) -> str:
    """Return the name of the file with what a profile feature averages."""
    return f"{PROFILE}{quote(feature, safe='')}.npy"


def write_shard_facts(directory: Path, rows: int, checkpoint_fingerprint: str, factory: str) -> None:
    """Write what a shard is, and which checkpoint its vectors came from."""
    facts = {"rows": rows, "factory": factory, "checkpoint_fingerprint": checkpoint_fingerprint}
    write_json(directory / FACTS, facts)


def read_shard_facts(directory: Path) -> dict[str, Any]:
    """Return what ``write_shard_facts`` wrote.

    Raises:
        ArtefactError: it is not there, or damaged.
    """
    path = directory / FACTS
    facts: dict[str, Any] = read_json(path, AGAIN)
    check_shape(facts, ShardFacts, str(path), AGAIN)
    return {name: facts[name] for name in ("rows", "factory", "checkpoint_fingerprint")}


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Return bytes and SHA-256 of each file below a directory, its manifest left out, by relative path.

    Hidden files are none of ours: temporaries, and what browsers of folders leave. They are removed.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.name.startswith("."):
            remove(path)
        elif path.is_file() and not name.startswith(".") and "/." not in name and name != MANIFEST:
            files[name] = file_facts(path)
    return files


def file_facts(path: Path) -> dict[str, Any]:
    """Return the bytes and SHA-256 of a file, as a manifest lists them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def verify_files(
    directory: Path,
    files: dict[str, dict[str, Any]],
    verified: Path | None = None,
    sha256: Callable[[Path], str] = sha256_file,
) -> None:
    """Refuse a directory whose files are not those of the list.

    Args:
        directory: of a generation.
        files: bytes and SHA-256 by relative path.
        verified: directory of a generation that was checked before. What is the same file there, by inode,
            and has the same facts in its manifest, is not read again.
        sha256: hashes a file.

    Raises:
        DamagedError: naming the first file that is missing or differs.
        ArtefactError: a file can not be read, or its name or a link leads out of the directory.
    """
    known: dict[str, Any] = {}
    if verified is not None:
        # Where that can not be read any more, everything is read here.
        with contextlib.suppress(ArtefactError):
            known = generation_manifest(verified)["files"]
    for name, facts in files.items():
        path = listed_file(directory, name, files, AGAIN)
        with _readable(path):
            size = os.stat(path).st_size
        if size != facts["bytes"]:
            raise DamagedError(f"{path} has {size} bytes, its manifest says {facts['bytes']}. {AGAIN}")
        if verified is not None and known.get(name) == facts and _same_file(path, verified / name):
            continue
        # It may be removed while others are read.
        with _readable(path):
            found = sha256(path)
        if found != facts["sha256"]:
            raise DamagedError(
                f"{path} is damaged: it has SHA-256 {found[:16]}..., its manifest says "
                f"{str(facts['sha256'])[:16]}... {AGAIN}"
            )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of a file that can not be read what that means for its generation."""
    try:
        yield
    except OSError as error:
        kind = DamagedError if isinstance(error, FileNotFoundError) else ArtefactError
        raise kind(f"{path} can not be read ({error.strerror}). {AGAIN}") from None


def _same_file(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def write_items(directory: Path, items: pa.Table, attributes: Mapping[str, AttributeConfig]) -> None:
    """Write the items of a shard and, where any are declared, their attributes.

    Args:
        directory: of the shard.
        items: in the order of its item rows, with the columns of the attributes.
        attributes: that queries can filter by.

    Raises:
        ConfigError: an attribute is not in the table.
    """
    _write_table(directory / ITEMS, items)
    if attributes:
        _write_table(directory / ATTRIBUTES, attribute_table(items, attributes))


def _write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow file of one batch, so that it can be memory-mapped whole."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        if len(table):
            writer.write_table(table.combine_chunks(), max_chunksize=len(table))

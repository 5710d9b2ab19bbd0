"""Items that were added, changed or deleted since a generation was built: a new one in seconds.

Nothing that grows with the catalogue is written beyond its ids: base shards, users and towers are shared with
the generation that is updated. What differs from the full build lies in one exact shard and in the list of
base rows that are dead. Answers depend on the catalogue that updates lead to, not on their order or grouping;
the id of the generation and the rows of new items may.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.artefacts import building, discard, fingerprint, finished, link_or_copy, locked, write_manifest
from twotower.errors import ArtefactError, OvertakenError, TwotowerError, UnavailableError
from twotower.generations.files import (
    DELTA,
    ITEM_IDS,
    KIND,
    TOMBSTONES,
    file_facts,
    write_items,
    write_shard_facts,
)
from twotower.generations.generation import Generation
from twotower.generations.manifest import GenerationManifest
from twotower.generations.names import CURRENT
from twotower.generations.store import Store
from twotower.index.build import build_shard, write_index
from twotower.index.parts import save_array
from twotower.lifecycle.delta import CatalogueState
from twotower.progress import say

_FACTORY = "Flat"
_AGAIN = "Run the update again: it is then made of what is published now"


@dataclass(frozen=True)
class Update:
    """What an update did."""

    generation: str
    """Id of the generation that holds the result; that of ``base`` when nothing changed."""
    base: str
    """Id of the generation that was updated."""
    added: int
    """Items that were not in the catalogue before."""
    changed: int
    """Items of the catalogue whose row differed."""
    deleted: int
    """Items taken out of the catalogue."""
    unchanged: int
    """Rows given that were there already, and deletions of items that were not in the catalogue."""
    share: float
    """Items that differ from the last full build, over its items."""
    published: bool
    """Whether the pointer names the result."""


def update_items(
    store: Store,
    changes: pa.Table | None = None,
    deletes: Sequence[str] = (),
    *,
    pointer: str = CURRENT,
    publish: bool = True,
    force: bool = False,
    ignore_missing: bool = False,
) -> Update:
    """Add, change and delete items of the generation that a pointer names, and publish the result.

    An item whose id is in the catalogue is replaced, whole; another is added. What is as given already is
    left alone, so that an update that is repeated does nothing. New items have no embedding of their own in
    the item tower: their vectors come from their features and the unknown id.

    Args:
        store: holds the generation.
        changes: of ``read_items``: item_id, title, and at least the columns that item features are read from.
        deletes: ids of items.
        pointer: names the generation to update, and the result.
        publish: let the pointer name the result.
        force: publish although the index recall of the build is below its target.
        ignore_missing: pass over deletions of ids that were never known.

    Raises:
        DataError: the items can not be read as the features of the towers, an id is given twice, both changed
            and deleted, or deleted and not known.
        ArtefactError: the pointer names no generation, or it is damaged.
        UnavailableError: the bucket does not answer; the result, where it was made, stays in the local
            folder. The same update again publishes it, unless the message says that the pointer names it.
        RefusedError: another publisher was faster; the result is removed, and nothing has changed.
    """
    base_id = store.current(pointer)
    if base_id is None:
        raise ArtefactError(
            f"{pointer} of {store.where} names no generation to update; build and publish one first, with "
            "python -m jobs.build_index"
        )
    base = Generation.open(store.fetch(base_id), verify=False)
    state = CatalogueState.of(base)
    edit = state.edit(changes, list(deletes), ignore_missing)
    if edit.nothing:
        say(f"generation {base_id} holds these items already")
        return Update(base_id, base_id, 0, 0, 0, edit.unchanged, state.share, publish)
    checkpoint = base.checkpoint()
    base.require_checkpoint(checkpoint)
    after = state.after(edit, checkpoint)
    name = fingerprint({"base": state.built_from, "content": after.content()})
    directory = store.path(name)
    with locked(store.root / ".work" / f"{name}.lock"):
        # The same catalogue may have been reached, and be in use, before.
        made = finished(directory, KIND, GenerationManifest) is None
        if made:
            with building(directory) as partial:
                _write(after, partial, name, checkpoint.fingerprint)
        if publish:
            try:
                store.publish(name, pointer, expected=base_id, force=force)
            except TwotowerError as error:
                if made and not _may_be_named(store, name, error):
                    # So that no reader sees a part of it.
                    discard(directory, ".refused")
                if isinstance(error, OvertakenError):
                    raise OvertakenError(error.message, _AGAIN) from None
                raise
    counts = (edit.num_added, edit.num_changed, edit.num_deleted)
    say(f"generation {name}: {counts[0]:,} items added, {counts[1]:,} changed, {counts[2]:,} deleted")
    return Update(name, base_id, *counts, edit.unchanged, after.share, publish)


def _write(state: CatalogueState, directory: Path, name: str, checkpoint_fingerprint: str) -> None:
    """Write a generation, the manifest last: new files, and links to the others."""
    manifest = state.base.manifest
    files = {n: f for n, f in manifest["files"].items() if not _is_replaced(n)}
    new = []
    if len(state.item_ids) > len(state.base.item_ids):
        state.item_ids.write(directory / ITEM_IDS)
        del files[ITEM_IDS]
        new.append(ITEM_IDS)
    for file in files:
        link_or_copy(state.base.file(file), directory / file)
    if state.dead.any():
        save_array(directory / TOMBSTONES, np.flatnonzero(state.dead))
        new.append(TOMBSTONES)
    shards = [s for s in manifest["shards"] if s["name"] != DELTA]
    if len(state.delta_rows):
        folder = directory / "shards" / DELTA
        folder.mkdir(parents=True)
        write_index(build_shard(state.delta_vectors, _FACTORY), folder / "index.faiss")
        save_array(folder / "item_rows.npy", state.delta_rows)
        write_items(folder, state.delta_items, state.base.declared_attributes)
        write_shard_facts(folder, len(state.delta_rows), checkpoint_fingerprint, _FACTORY)
        new += [f"shards/{DELTA}/{p.name}" for p in folder.iterdir()]
        shards.append(
            {
                "name": DELTA,
                "rows": len(state.delta_rows),
                "factory": _FACTORY,
                "role": DELTA,
                "checkpoint_fingerprint": checkpoint_fingerprint,
            }
        )
    content = {
        # In whose place the base stands is not said of what is made from it.
        **{k: v for k, v in manifest.items() if k not in ("kind", "schema_version", "replaces")},
        "id": name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        "num_items": state.num_items,
        "shards": shards,
        "delta": state.facts,
        "files": dict(sorted({**files, **{n: file_facts(directory / n) for n in new}}.items())),
    }
    write_manifest(directory, KIND, content)


def _is_replaced(name: str) -> bool:
    """Whether a file of a generation is written anew by every update."""
    return name == TOMBSTONES or name.startswith(f"shards/{DELTA}/")


def _may_be_named(store: Store, name: str, error: TwotowerError) -> bool:
    """Return whether a pointer names a generation that could not be published, as far as can be told."""
    # A request whose answer was lost may have been carried out, or be yet.
    if isinstance(error, UnavailableError):
        return True
    try:
        return name in store.pointers().values()
    except TwotowerError:
        return True

"""A generation: everything that is needed to answer queries, in one immutable directory.

It holds both towers, the users' histories and seen sets, and the index shards of one catalogue. Its towers
and its shards are of one checkpoint. ``generations/writing.py`` makes it, ``Generation.open`` reads it
memory-mapped; the manifest is the last file written and lists the bytes and SHA-256 of all others.

A build writes base shards only. An update (``update_items``) shares them with the generation it was made
from, and adds the shard ``delta`` of the items changed since and ``tombstones.npy``, the base rows that are
dead. Item rows are 0 to ``schema.num_items`` - 1 as in the dataset; items that an update added come behind
them, and no tower knows those.

Symbols: U users, N catalogue items of the build, n items of a shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from twotower.artefacts import MANIFEST, read_manifest
from twotower.config import AttributeConfig, Config, stored_config
from twotower.data.histories import Histories
from twotower.data.vocabulary import Vocabulary
from twotower.errors import ArtefactError, ArtefactMismatchError, ConfigError
from twotower.generations.files import (
    AGAIN,
    ATTRIBUTES,
    BASE,
    COLUMN,
    CONFIG,
    DELTA,
    FACTS,
    HISTORY,
    HISTORY_CUT,
    ITEM_IDS,
    ITEMS,
    PROFILE,
    TOMBSTONES,
    read_shard_facts,
    verify_files,
)
from twotower.generations.items import ItemTables, mapped_table
from twotower.generations.manifest import generation_manifest
from twotower.generations.yielding import pause
from twotower.hashing import sha256_file
from twotower.index.attributes import Attributes
from twotower.index.build import read_index
from twotower.index.filter_plan import FilterPlan
from twotower.index.search import Searcher, Shard
from twotower.index.spec import Effort
from twotower.listing import listed_file
from twotower.schema import FeatureSchema

if TYPE_CHECKING:
    from twotower.model.checkpoint import Checkpoint
    from twotower.model.features import Columns

_NO_ROWS = np.zeros(0, np.int64)


class Generation:
    """A finished generation; its arrays are memory-mapped when first asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Take what ``open`` has checked."""
        self.path = path
        self.manifest = manifest
        self._is_verified = False

    @classmethod
    def open(
        cls,
        path: Path | str,
        verify: bool = True,
        verified: Path | None = None,
        sha256: Callable[[Path], str] = sha256_file,
    ) -> Generation:
        """Return the generation of a directory.

        Args:
            path: the directory.
            verify: check the bytes and SHA-256 of every file.
            verified: directory of a generation whose files were checked before; files that this one shares
                with it are not read again.
            sha256: hashes a file.

        Raises:
            ArtefactMismatchError: its query tower and a shard are of different checkpoints.
            ArtefactError: it is not finished, or a file is missing or not as it was written.
        """
        path = Path(path)
        generation = cls(path, generation_manifest(path))
        generation._check_fingerprints()
        if verify:
            verify_files(path, generation.manifest["files"], verified, sha256)
            generation._is_verified = True
        return generation

    @property
    def id(self) -> str:
        """Its name in the store."""
        return str(self.manifest["id"])

    @property
    def num_items(self) -> int:
        """Items that can be answered."""
        return int(self.manifest["num_items"])

    @property
    def as_of(self) -> int | None:
        """Time of the latest interaction it knows, microseconds UTC; None without times."""
        value = self.manifest["as_of"]
        return None if value is None else int(value)

    @property
    def effort(self) -> Effort:
        """How hard a search has to look for the index recall in the manifest."""
        return Effort(**self.manifest["index"]["effort"])

    def checkpoint(self, device: str = "cpu") -> Checkpoint:
        """Return both towers, loaded anew, on a device of torch."""
        # Here: a process that only searches takes no second and no memory for torch.
        from twotower.model.checkpoint import WEIGHTS, Checkpoint

        self.file(f"model/{WEIGHTS}")
        known = self.manifest["files"][f"model/{WEIGHTS}"]["sha256"] if self._is_verified else None
        return Checkpoint.open(self.path / "model", device, known)

    @functools.cached_property
    def schema(self) -> FeatureSchema:
        """Features of the towers."""
        file = self.file("model/features.json")
        return FeatureSchema.parse(_content(file), str(file), AGAIN)

    def file(self, name: str) -> Path:
        """Return the path of one of its files; no other is ever opened.

        Raises:
            ArtefactError: its manifest lists no such file, or it is not there, or a link to somewhere else.
        """
        files = self.manifest.get("files")
        # One that is being built has no list yet.
        return self.path / name if files is None else listed_file(self.path, name, files, AGAIN)

    @functools.cached_property
    def user_ids(self) -> Vocabulary:
        """User ids in row order."""
        return Vocabulary.open(self.file("user_ids.arrow"))

    @functools.cached_property
    def item_ids(self) -> Vocabulary:
        """Item ids in row order: of the catalogue, those only in interactions, those that updates added."""
        return Vocabulary.open(self.file(ITEM_IDS))

    @functools.cached_property
    def histories(self) -> Histories:
        """Each user's latest positive interactions of all splits, at least as many as a feature looks at."""
        offsets, items, times, weights = (self._array(f"users/history_{name}.npy") for name in HISTORY)
        if HISTORY_CUT in self.manifest.get("files", ()):
            cut = self._array(HISTORY_CUT)
        else:
            # Of an earlier release, which kept just so many: whoever has them may have had more.
            cut = np.diff(offsets) >= self.schema.max_history
        return Histories(offsets, items, times, weights, cut)

    def seen(self, user_row: int) -> npt.NDArray[np.int32]:
        """Return all items a user ever had, of every kind and split, ascending [m] int32."""
        return self.seen_item_rows[int(self.seen_offsets[user_row]) : int(self.seen_offsets[user_row + 1])]

    @functools.cached_property
    def seen_offsets(self) -> npt.NDArray[np.int64]:
        """Where each user's seen item rows begin: [U + 1] int64."""
        return self._array("users/seen_offsets.npy")

    @functools.cached_property
    def seen_item_rows(self) -> npt.NDArray[np.int32]:
        """Item rows that users ever had, of every kind and split, ascending for each user: [m] int32."""
        return self._array("users/seen_item_rows.npy")

    @functools.cached_property
    def user_columns(self) -> Columns:
        """Static columns of all users by feature name, [U, ...] each."""
        return self._named("users", COLUMN)

    @functools.cached_property
    def profiles(self) -> dict[str, npt.NDArray[np.float32]]:
        """What profile features average, by query feature name."""
        return self._named("items", PROFILE)

    @functools.cached_property
    def popularity(self) -> npt.NDArray[np.int32]:
        """Item rows of the build by positive interactions, most first, then by row: [N] int32."""
        return self._array("popularity.npy")

    @functools.cached_property
    def declared_attributes(self) -> dict[str, AttributeConfig]:
        """Attributes that queries can filter by, as the configuration of the build declared them."""
        return dict(self.config.index.attributes)

    @functools.cached_property
    def config(self) -> Config:
        """The configuration it was built with."""
        file = self.file(CONFIG)
        return stored_config(_content(file), str(file), AGAIN)

    @functools.cached_property
    def items(self) -> ItemTables:
        """Item ids, titles and feature source columns of the items that can be answered."""
        return ItemTables(
            [(self._shard_file(s, ITEMS), self._item_rows(s), self._dead(s)) for s in self._shards]
        )

    @functools.cached_property
    def attributes(self) -> Attributes:
        """What queries can filter by, of the items that can be answered; built when first asked for."""
        return self.attributes_of(self.shard_names)

    def attributes_of(self, names: Collection[str]) -> Attributes:
        """Return what queries can filter by, of the items of some shards."""
        tables = []
        if self.declared_attributes:
            for shard in self._named_shards(names):
                path, item_rows = self._shard_file(shard, ATTRIBUTES), self._item_rows(shard)
                tables.append((mapped_table(path, len(item_rows)), item_rows, self._dead(shard)))
        return Attributes(tables, len(self.item_ids))

    def searcher(self, threads: int = 1, names: Collection[str] | None = None) -> Searcher:
        """Return a searcher over shards, at the effort that the index recall was measured with.

        Args:
            threads: FAISS threads of a search.
            names: of the shards; all when not given.
        """
        shards = [
            Shard(self._index(s), self._item_rows(s), self._dead(s))
            for s in self._named_shards(self.shard_names if names is None else names)
        ]
        pause()
        filters = self.manifest["index"].get("filters")
        return Searcher(shards, self.effort, threads, FilterPlan.from_json(filters) if filters else None)

    def base_rows(self) -> npt.NDArray[np.int64]:
        """Return the item rows of the base shards, dead ones too, in no order: [N] int64."""
        return np.concatenate([_NO_ROWS, *(self._item_rows(s) for s in self._shards if s["role"] == BASE)])

    def answerable_rows(self) -> npt.NDArray[np.int64]:
        """Return the item rows that can be answered: ascending [num_items] int64."""
        alive = np.setdiff1d(self.base_rows(), self.dead_rows, assume_unique=True)
        return np.sort(np.concatenate([alive, self.delta_rows]))

    @functools.cached_property
    def dead_rows(self) -> npt.NDArray[np.int64]:
        """Item rows of base shards that updates deleted or replaced: ascending [m] int64."""
        return np.array(self._array(TOMBSTONES)) if TOMBSTONES in self._names else _NO_ROWS

    @property
    def delta_rows(self) -> npt.NDArray[np.int64]:
        """Item rows of the delta shard: ascending [m] int64."""
        return next((self._item_rows(s) for s in self._shards if s["role"] == DELTA), _NO_ROWS)

    def delta_vectors(self) -> npt.NDArray[np.float32]:
        """Return the vectors of ``delta_rows`` as they were encoded, [n, D] float32."""
        for shard in self._shards:
            if shard["role"] == DELTA:
                index = self._index(shard)
                return np.array(index.reconstruct_n(0, index.ntotal), dtype=np.float32)
        return np.zeros((0, self.manifest["embedding_dim"]), np.float32)

    def _index(self, shard: dict[str, Any]) -> Any:
        """Return the index of a shard, as FAISS has it."""
        path, dim = self._shard_file(shard, "index.faiss"), int(self.manifest["embedding_dim"])
        try:
            return read_index(path, shard["factory"], dim, shard["rows"])
        except ConfigError as error:
            raise ArtefactError(f"the manifest of {self.path} is damaged: {error}. {AGAIN}") from None

    def require_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Refuse towers that did not encode the shards, by the weights themselves.

        Raises:
            ArtefactMismatchError: they are of another training.
        """
        expected = self.manifest["checkpoint_fingerprint"]
        if checkpoint.fingerprint != expected:
            raise ArtefactMismatchError(
                f"the towers in {self.path} are of {checkpoint.fingerprint}, its shards of {expected}; "
                f"vectors of different trainings do not fit. {AGAIN}"
            )

    def _dead(self, shard: dict[str, Any]) -> npt.NDArray[np.int64]:
        return self.dead_rows if shard["role"] == BASE else _NO_ROWS

    @property
    def shard_names(self) -> list[str]:
        """Names of its shards."""
        return [str(s["name"]) for s in self._shards]

    def shard_groups(self, num_groups: int) -> list[list[str]]:
        """Return the names of the shards of each group, so that groups hold about as many items.

        Every process that asks gets the same groups. The delta of updates goes to the smallest.

        Raises:
            ArtefactError: there are fewer base shards than groups.
        """
        base = [s for s in self._shards if s["role"] == BASE]
        if len(base) < num_groups:
            raise ArtefactError(
                f"generation {self.id} has {len(base)} shards, too few for {num_groups} groups; build it "
                f"with index.num_shards={num_groups} or more, or serve it with fewer groups"
            )
        groups: list[list[str]] = [[] for _ in range(num_groups)]
        rows = [0] * num_groups
        for shard in sorted(self._shards, key=lambda s: (s["role"] != BASE, -s["rows"], s["name"])):
            # The number of shards decides between groups of as many items: none stays without a shard.
            smallest = min(range(num_groups), key=lambda g: (rows[g], len(groups[g])))
            groups[smallest].append(str(shard["name"]))
            rows[smallest] += int(shard["rows"])
        return groups

    def _named_shards(self, names: Collection[str]) -> list[dict[str, Any]]:
        return [s for s in self._shards if s["name"] in names]

    @property
    def _shards(self) -> list[dict[str, Any]]:
        return list(self.manifest["shards"])

    def _shard_file(self, shard: dict[str, Any], name: str) -> Path:
        return self.file(f"shards/{shard['name']}/{name}")

    def _item_rows(self, shard: dict[str, Any]) -> npt.NDArray[np.int64]:
        # In memory: every search gathers from it.
        return np.array(self._array(f"shards/{shard['name']}/item_rows.npy"))

    def _named(self, folder: str, prefix: str) -> dict[str, npt.NDArray[Any]]:
        begin = f"{folder}/{prefix}"
        found = sorted(n for n in self._names if n.startswith(begin) and n.endswith(".npy"))
        names = [n.removeprefix(f"{folder}/") for n in found]
        return {
            unquote(n.removeprefix(prefix).removesuffix(".npy")): self._array(f"{folder}/{n}") for n in names
        }

    @property
    def _names(self) -> Collection[str]:
        """Of its files."""
        if (files := self.manifest.get("files")) is not None:
            return list(files)
        return [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]

    def _array(self, name: str) -> npt.NDArray[Any]:
        path = self.file(name)
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, OverflowError) as error:
            raise ArtefactError(f"{self.path / name} can not be read ({error}); {AGAIN}") from None
        # A plain view of the same pages: every slice of a memmap object costs several times as much.
        array: npt.NDArray[Any] = np.asarray(mapped)
        return array

    def _check_fingerprints(self) -> None:
        expected = self.manifest["checkpoint_fingerprint"]
        model = read_manifest(self.file(f"model/{MANIFEST}").parent, "checkpoint").get("fingerprint")
        found = [("model/manifest.json", model)]
        for shard in self._shards:
            name = f"shards/{shard['name']}"
            found.append((f"{MANIFEST} for {name}", shard["checkpoint_fingerprint"]))
            own = read_shard_facts(self._shard_file(shard, FACTS).parent)
            found.append((f"{name}/shard.json", own["checkpoint_fingerprint"]))
        for what, fingerprint in found:
            if fingerprint != expected:
                raise ArtefactMismatchError(
                    f"generation {self.path} is of checkpoint {expected}, but {self.path}/{what} says "
                    f"{fingerprint}: a query tower and an index of different trainings do not fit. {AGAIN}"
                )


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{file} can not be read ({error.strerror}); {AGAIN}") from None

"""The LightGCN text format: ``train.txt`` and ``test.txt``, a user and then his items on each line."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from twotower.config import LightGCNSource
from twotower.data.chunks import CHUNK_ROWS, BadRows, Chunk, SideTable, TimeUnit
from twotower.data.sources.finding import stamp
from twotower.errors import DataError
from twotower.hashing import sha256_file

_SPLITS = {"train.txt": "train", "test.txt": "test"}


class LightGCN:
    """Interactions without times whose split is given.

    Ids are the numbers in the files. Where ``item_list.txt`` or ``user_list.txt`` is there (a header, then
    original id and number on each line) it is the item or user table, with the original id as a column.
    """

    has_times = False
    time_unit: TimeUnit | None = None
    value_range: tuple[float, float] | None = None
    notice: str | None = None
    num_rows: int | None = None

    def __init__(self, source: LightGCNSource) -> None:
        """Find the files.

        Raises:
            DataError: the folder or zip is not there, damaged, or lacks a file.
        """
        self.path = Path(source.path).expanduser()
        if not self.path.exists():
            raise DataError(
                f"data.source.path {source.path!r} does not exist; give a folder or zip with train.txt"
            )
        self._members = self._find()
        missing = [name for name in _SPLITS if name not in self._members]
        if missing:
            raise DataError(f"{self.path} lacks {' and '.join(missing)}; the LightGCN format needs both")

    def signature(self) -> dict[str, Any]:
        """Return path, size and time of change of every file."""
        files = [self.path] if self.path.is_file() else [self.path / n for n in sorted(self._members)]
        return {"files": [stamp(f) for f in files]}

    def facts(self) -> dict[str, Any]:
        """Return the SHA-256 of a zip."""
        return {"sha256": sha256_file(self.path)} if self.path.is_file() else {}

    def item_table(self, bad: BadRows) -> SideTable | None:
        """Return item_id and original_id of ``item_list.txt``, or None."""
        return self._list("item", bad)

    def user_table(self, bad: BadRows) -> SideTable | None:
        """Return user_id and original_id of ``user_list.txt``, or None."""
        return self._list("user", bad)

    def chunks(self, bad: BadRows) -> Iterator[Chunk]:
        """Yield the pairs of train.txt and then of test.txt."""
        for file, split in _SPLITS.items():
            users: list[int] = []
            counts: list[int] = []
            numbers: list[int] = []
            items: list[int] = []
            for number, words in self._lines(file):
                try:
                    user, *liked = map(int, words)
                except ValueError:
                    bad.add(
                        file,
                        [number],
                        "that is no line of whole numbers",
                        [b" ".join(words)[:60].decode("latin-1")],
                    )
                    continue
                users.append(user)
                counts.append(len(liked))
                numbers.append(number)
                items.extend(liked)
                if len(items) >= CHUNK_ROWS:
                    yield _chunk(file, split, users, counts, numbers, items)
                    users, counts, numbers, items = [], [], [], []
            if items:
                yield _chunk(file, split, users, counts, numbers, items)

    def _find(self) -> dict[str, str]:
        """Return where each known file is: its member name in a zip, or its path."""
        known = (*_SPLITS, "item_list.txt", "user_list.txt")
        if self.path.is_dir():
            return {n: str(self.path / n) for n in known if (self.path / n).is_file()}
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [n for n in archive.namelist() if "__MACOSX" not in n]
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.path} is not a complete zip file ({error}); get it again") from None
        shortest = sorted(names, key=len, reverse=True)
        return {n.rsplit("/", 1)[-1]: n for n in shortest if n.rsplit("/", 1)[-1] in known}

    def _lines(self, name: str) -> Iterator[tuple[int, list[bytes]]]:
        try:
            if self.path.is_dir():
                with open(self._members[name], "rb") as file:
                    yield from _words(file)
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self._members[name]) as member:
                    yield from _words(member)  # type: ignore[arg-type]
        except (zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"{name} in {self.path} is damaged ({error}); get the zip again") from None

    def _list(self, side: str, bad: BadRows) -> SideTable | None:
        file = f"{side}_list.txt"
        if file not in self._members:
            return None
        ids: list[str] = []
        originals: list[str] = []
        for number, words in self._lines(file):
            if number == 1 and words[-1:] == [b"remap_id"]:
                continue
            if len(words) != 2 or not words[1].isdigit():
                bad.add(
                    file,
                    [number],
                    "that is not an original id and a number",
                    [b" ".join(words)[:60].decode("latin-1")],
                )
                continue
            ids.append(str(int(words[1])))
            originals.append(words[0].decode("utf-8", "replace"))
        columns = {f"{side}_id": pa.array(ids, pa.string()), "original_id": pa.array(originals, pa.string())}
        return SideTable(file, pa.table(columns))


def _words(file: BinaryIO) -> Iterator[tuple[int, list[bytes]]]:
    for number, line in enumerate(file, start=1):
        words = line.split()
        if words:
            yield number, words


def _chunk(
    file: str, split: str, users: list[int], counts: list[int], numbers: list[int], items: list[int]
) -> Chunk:
    return Chunk(
        file=file,
        rows=np.repeat(np.array(numbers, dtype=np.int64), counts),
        user=pa.array(np.repeat(np.array(users, dtype=np.int64), counts)),
        item=pa.array(np.array(items, dtype=np.int64)),
        split=pa.repeat(split, len(items)),
    )

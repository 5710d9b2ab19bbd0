"""Users out of lists of recommendations: folders of Parquet files with a column ``user_id``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.artefacts import MANIFEST, link_or_copy, read_manifest, write_manifest

KIND = "recommendations"
_USER = "user_id"


@dataclass(frozen=True)
class Lists:
    """Lists of recommendations that hold users to be forgotten."""

    path: Path
    ids: Sequence[str]
    files: dict[str, int]
    """Rows that go, by file."""
    found: frozenset[str]
    """Users that have rows."""

    @property
    def num_rows(self) -> int:
        """Rows that go."""
        return sum(self.files.values())

    @classmethod
    def of(cls, path: Path, ids: Sequence[str]) -> Lists:
        """Look for users in a finished artefact."""
        wanted, files, found = pa.array(ids, pa.string()), {}, set()
        for file in sorted(path.rglob("*.parquet")):
            if _USER in pq.read_schema(file).names:
                users = pq.read_table(file, columns=[_USER]).column(_USER)
                theirs = users.filter(pc.is_in(users, value_set=wanted))
                if len(theirs):
                    files[file.relative_to(path).as_posix()] = len(theirs)
                    found.update(theirs.unique().to_pylist())
        return cls(path, ids, files, frozenset(found))

    def write(self, directory: Path) -> None:
        """Write the artefact without these rows into an empty directory, the manifest last."""
        wanted = pa.array(self.ids, pa.string())
        for folder, _, names in os.walk(self.path):
            for name in names:
                source = Path(folder, name)
                target = directory / source.relative_to(self.path)
                if source.relative_to(self.path).as_posix() in self.files:
                    table = pq.read_table(source)
                    theirs = pc.is_in(table.column(_USER), value_set=wanted)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    # Also what a part says of itself in its footer.
                    pq.write_table(table.filter(pc.invert(theirs)), target, compression="zstd")
                elif source != self.path / MANIFEST:
                    link_or_copy(source, target)
        manifest = read_manifest(self.path, KIND)
        content = {k: v for k, v in manifest.items() if k not in ("kind", "schema_version")}
        if "num_rows" in content:
            content["num_rows"] -= self.num_rows
        write_manifest(directory, KIND, content)

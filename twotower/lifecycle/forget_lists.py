"""Users out of lists of recommendations: folders of Parquet files with a column ``user_id``.

Lists for files of queries have a column ``query_id`` too, which often is the user's id.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from twotower.artefacts import MANIFEST, link_or_copy, read_manifest, write_manifest
from twotower.errors import ArtefactError
from twotower.listing import STORED, Count

KIND = "recommendations"
_NAMES = ("user_id", "query_id")


class RecommendationsManifest(BaseModel):
    """The manifest of lists of recommendations."""

    model_config = STORED

    id: str
    num_rows: Count = 0


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
            try:
                names = [name for name in _NAMES if name in pq.read_schema(file).names]
                table = pq.read_table(file, columns=names) if names else None
            except (OSError, pa.ArrowException) as error:
                raise ArtefactError(f"{file} can not be read ({error}); delete {path}") from None
            if table is not None and (rows := int(pc.sum(_theirs(table, wanted)).as_py() or 0)):
                files[file.relative_to(path).as_posix()] = rows
                for name in names:
                    column = table.column(name)
                    found.update(column.filter(pc.is_in(column, value_set=wanted)).to_pylist())
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
                    theirs = _theirs(table, wanted)
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


def _theirs(table: pa.Table, wanted: pa.Array) -> pa.ChunkedArray:
    """Return for each row whether a column names one of the users."""
    masks = [pc.is_in(table.column(name), value_set=wanted) for name in _NAMES if name in table.column_names]
    return masks[0] if len(masks) == 1 else pc.or_(*masks)

"""Users out of reports: those shown as examples, and their rows among the metrics of test users.

Examples are in report.json, and between comments in report.html that name an example's ``key``, so that it is
found without reading the page's markup. users.parquet names users by their rows in the dataset, which its
manifest names; the means over everybody stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from twotower.artefacts import MANIFEST, link_or_copy, read_manifest, write_bytes, write_json, write_manifest
from twotower.data.forget import Erasure
from twotower.errors import ArtefactError
from twotower.jsonfiles import check_shape, read_json
from twotower.listing import STORED

KIND = "report"
_NUMBERS, _PAGE, _USERS = "report.json", "report.html", "users.parquet"
_USER_ROW = "user_row"
"""Column of ``_USERS``; see ``evaluation.outcomes``."""


class _Example(BaseModel):
    """A user who is shown."""

    model_config = STORED

    user_id: str
    key: str


class _Content(BaseModel):
    """What is read of report.json."""

    model_config = STORED

    examples: list[_Example] = []


@dataclass(frozen=True)
class ReportedUsers:
    """A report, and what it holds of users to be forgotten."""

    path: Path
    content: dict[str, Any]
    """Of report.json."""
    found: frozenset[str]
    """Users to be forgotten that it shows."""
    dataset: str | None
    """Fingerprint of the dataset whose rows users.parquet names; None without that file."""
    erasure: Erasure | None
    """What goes from that dataset; None where it is of another one."""
    num_rows: int
    """Rows of users.parquet that go."""

    @classmethod
    def of(cls, path: Path, ids: Sequence[str], erasures: Sequence[Erasure]) -> ReportedUsers:
        """Look for users in a finished report.

        Args:
            path: its directory.
            ids: of the users.
            erasures: of the datasets that know them.

        Raises:
            ArtefactError: it is damaged.
        """
        manifest = read_manifest(path, KIND)
        again = f"Delete {path} and evaluate again."
        numbers = path / _NUMBERS
        content = read_json(numbers, again) if numbers.is_file() else {}
        check_shape(content, _Content, str(numbers), again)
        shown = {example["user_id"] for example in content.get("examples", [])}
        dataset = str(manifest.get("dataset")) if (path / _USERS).is_file() else None
        # One that was rewritten by a run that was killed is of the dataset that there will be.
        erasure = next((e for e in erasures if e.old_dataset == dataset), None)
        num_rows = 0 if erasure is None else int((~_stay(path, erasure)).sum())
        return cls(path, content, frozenset(shown & set(ids)), dataset, erasure, num_rows)

    @property
    def removed(self) -> dict[str, int]:
        """Counts of what goes, by what they are of."""
        counts = {"users": len(self.found), "metrics_of_users": self.num_rows}
        return {name: count for name, count in counts.items() if count}

    def write(self, directory: Path) -> None:
        """Write the report without these users into an empty directory, the manifest last.

        Raises:
            ArtefactError: the page does not mark one of them.
        """
        examples = self.content.get("examples", [])
        gone = [e for e in examples if e["user_id"] in self.found]
        made = {MANIFEST}
        if self.num_rows:
            assert self.erasure is not None
            table = _metrics(self.path).filter(pa.array(_stay(self.path, self.erasure)))
            pq.write_table(table, directory / _USERS, compression="zstd")
            made.add(_USERS)
        if gone:
            kept = [e for e in examples if e["user_id"] not in self.found]
            write_json(directory / _NUMBERS, {**self.content, "examples": kept})
            made.add(_NUMBERS)
        if gone and (self.path / _PAGE).is_file():
            self._write_page(directory, gone)
            made.add(_PAGE)
        for file in sorted(self.path.iterdir()):
            if file.name not in made:
                link_or_copy(file, directory / file.name)
        manifest = read_manifest(self.path, KIND)
        facts = {k: v for k, v in manifest.items() if k not in ("kind", "schema_version")}
        if self.erasure is not None:
            # So that the next users who are forgotten are found by their rows too.
            facts["dataset"] = self.erasure.new_dataset
        write_manifest(directory, KIND, facts)

    def _write_page(self, directory: Path, gone: Sequence[dict[str, Any]]) -> None:
        page = (self.path / _PAGE).read_bytes()
        for example in gone:
            key = re.escape(example["key"].encode())
            page, count = re.subn(rb"<!--user %s-->.*?<!--/user-->" % key, b"", page, flags=re.DOTALL)
            if count != 1:
                raise ArtefactError(
                    f"{self.path / _PAGE} does not mark an example user that {_NUMBERS} names; delete "
                    f"{self.path}"
                )
        write_bytes(directory / _PAGE, page)


def _stay(path: Path, erasure: Erasure) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which rows of users.parquet stay, [Q] bool."""
    rows = np.asarray(_metrics(path, [_USER_ROW])[_USER_ROW])
    return ~np.isin(rows, erasure.rows)


def _metrics(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path / _USERS, columns=columns)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise ArtefactError(f"{path / _USERS} can not be read ({error}). Delete {path}") from None

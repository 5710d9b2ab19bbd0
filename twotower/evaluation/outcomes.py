"""What actors measured, in files: merged to a report's numbers, and kept user by user.

Each range of test users is one file, written at once, so that a range that is ranked again (its actor was
lost) takes the place of its first file.

Legend: Q test users, C metrics.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from twotower.artefacts import write_bytes
from twotower.data.knowledge import Holdout
from twotower.errors import ArtefactError
from twotower.evaluation.comparison import Measure, Measured, Outcome
from twotower.evaluation.lists import Overlap
from twotower.evaluation.metrics import metric_names

Ints = NDArray[np.int64]
Values = NDArray[np.float32]

USERS = "users.parquet"
"""File of a report with a row for each test user."""
FACTS = ("user_row", "known", "relevant")
"""Its first columns, int64: the user's row in the dataset, items known to the query, relevant items."""

_VALUES, _OVERLAP = "values", "overlap"


def write_outcomes(folder: Path, start: int, measured: Measured) -> None:
    """Write what rankers came to on the range that begins at user ``start``."""
    arrays: dict[str, NDArray[Any]] = {f"{_OVERLAP}/{n}": a for n, a in measured.overlap.state().items()}
    for ranker, outcome in measured.outcomes.items():
        arrays |= {f"{ranker}/{name}": array for name, array in outcome.state().items()}
        arrays[f"{ranker}/{_VALUES}"] = measured.values[ranker]
    buffer = io.BytesIO()
    named: dict[str, Any] = arrays
    np.savez(buffer, **named)
    write_bytes(folder / f"{start:012d}.npz", buffer.getvalue())


class Outcomes:
    """The files of all ranges."""

    def __init__(self, folder: Path, rankers: Sequence[str], measure: Measure) -> None:
        """Take the folder, the names of the rankers and what was measured."""
        self._paths = sorted(folder.glob("*.npz"))
        self.rankers = list(rankers)
        self._measure = measure
        self.values: Mapping[str, Values] = _UserValues(self._paths, self.rankers)
        """By ranker, [Q, C] float32 in the order of the test users, read when asked for."""

    def merged(self) -> dict[str, Outcome]:
        """Return the outcome of each ranker on all users."""
        merged = {name: Outcome(self._measure) for name in self.rankers}
        for path in self._paths:
            with np.load(path) as file:
                for ranker, outcome in merged.items():
                    outcome.merge(_Part(file, ranker))
        return merged

    def overlap(self) -> float:
        """Return ``Overlap.result`` of the model."""
        overlap = Overlap(self._measure.num_items)
        for path in self._paths:
            with np.load(path) as file:
                overlap.merge(_Part(file, _OVERLAP))
        return overlap.result()

    def write_users(self, path: Path, held: Holdout, known: Ints) -> None:
        """Write the metrics of each user as Parquet.

        The columns are ``FACTS`` and then, float32, the metrics of the model (``recall@10``) and of each
        other ranker (``popularity_recall@10``).

        Args:
            path: of the file.
            held: the test users.
            known: [Q] int64, items that the query of each knows.
        """
        names = metric_names(self._measure.ks)
        facts = dict(zip(FACTS, (held.user_rows, known, np.diff(held.relevant_offsets)), strict=True))
        columns = [column_name(ranker, name) for ranker in self.rankers for name in names]
        schema = pa.schema([(n, pa.int64()) for n in FACTS] + [(n, pa.float32()) for n in columns])
        first = 0
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for part in self._paths:
                with np.load(part) as file:
                    values = np.concatenate([file[f"{r}/{_VALUES}"] for r in self.rankers], axis=1)
                rows = slice(first, first + len(values))
                arrays = [np.asarray(column[rows], dtype=np.int64) for column in facts.values()]
                writer.write_table(pa.table([*arrays, *np.ascontiguousarray(values.T)], schema=schema))
                first += len(values)


def column_name(ranker: str, metric: str) -> str:
    """Return the name of a ranker's metric among those of others."""
    return metric if ranker == "model" else f"{ranker}_{metric}"


def read_users(report: Path, metrics: Sequence[str]) -> Values:
    """Return the model's metrics of each user of a report, [Q, C] float32.

    Raises:
        ArtefactError: the report has none, or lacks a metric.
    """
    path = report / USERS
    try:
        table = pq.read_table(path, columns=list(metrics))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise ArtefactError(
            f"{path} can not be read ({error}). Delete {report} and evaluate that model again."
        ) from None
    absent = [name for name in metrics if name not in table.column_names]
    if absent:
        raise ArtefactError(f"{path} has no column {absent[0]!r}; evaluate that model again")
    return np.stack([np.asarray(table[name], dtype=np.float32) for name in metrics], axis=1)


class _Part(Mapping[str, Any]):
    """The arrays of one ranker in a file."""

    def __init__(self, file: Mapping[str, Any], ranker: str) -> None:
        self._file = file
        self._ranker = ranker

    def __getitem__(self, name: str) -> Any:
        return self._file[f"{self._ranker}/{name}"]

    def __iter__(self) -> Iterator[str]:
        start = f"{self._ranker}/"
        return (name.removeprefix(start) for name in self._file if name.startswith(start))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _UserValues(Mapping[str, Values]):
    """Values of all users by ranker; one ranker's at a time are in memory."""

    def __init__(self, paths: list[Path], rankers: list[str]) -> None:
        self._paths = paths
        self._rankers = rankers

    def __getitem__(self, ranker: str) -> Values:
        if ranker not in self._rankers:
            raise KeyError(ranker)
        parts = []
        for path in self._paths:
            with np.load(path) as file:
                parts.append(file[f"{ranker}/{_VALUES}"])
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rankers)

    def __len__(self) -> int:
        return len(self._rankers)

"""The MovieLens data sets by official name: three layouts, streamed out of the zip."""

from __future__ import annotations

import contextlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from twotower import cells
from twotower.config import MovieLensSource
from twotower.data.chunks import CHUNK_ROWS, BadRows, Chunk, IntArray, SideTable, TimeUnit
from twotower.data.sources import tables
from twotower.data.sources.csv_files import Dialect, Text, csv_batches, dialect_of
from twotower.data.sources.download import fetch_zip
from twotower.data.sources.finding import Opener
from twotower.errors import DownloadError

OFFICIAL = "https://files.grouplens.org/datasets/movielens"
TERMS = (
    "MovieLens data, GroupLens Research, University of Minnesota: for research, not for commercial "
    "use without "
    "permission; acknowledge it (doi 10.1145/2827872). Terms: README in the zip, "
    "https://grouplens.org/datasets/movielens"
)
NO_GENRES = "(no genres listed)"
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller",
    "War", "Western",
)  # fmt: skip
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_RATINGS = ["user", "item", "rating", "time"]
_DAT = {"ml-1m": "iso-8859-1", "ml-10m": "utf-8"}
_AGES_1M = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56+",
}


class MovieLens:
    """Ratings with times, a catalogue with title, genres and year, and for the two old sets a user table."""

    has_times = True
    time_unit: TimeUnit | None = "s"
    num_rows: int | None = None
    notice: str | None = TERMS

    def __init__(self, source: MovieLensSource, cache: str, mirror: str | None) -> None:
        """Fetch the zip and find its files.

        Raises:
            DownloadError: it can not be fetched, or does not hold what it should.
        """
        self.name = source.name
        self.fetched = fetch_zip(f"{source.name}.zip", OFFICIAL, mirror, Path(cache) / "movielens")
        self.value_range: tuple[float, float] | None = (
            (1.0, 5.0) if source.name in ("ml-100k", "ml-1m") else (0.5, 5.0)
        )
        if source.name == "ml-100k":
            self._files = {"ratings": "u.data", "items": "u.item", "users": "u.user"}
        elif source.name in _DAT:
            self._files = {"ratings": "ratings.dat", "items": "movies.dat"}
            if source.name == "ml-1m":
                self._files["users"] = "users.dat"
        else:
            self._files = {"ratings": "ratings.csv", "items": "movies.csv"}
        with zipfile.ZipFile(self.fetched.path) as archive:
            names = sorted((n for n in archive.namelist() if "__MACOSX" not in n), key=len)
        for role, file in self._files.items():
            member = next((n for n in names if n.rsplit("/", 1)[-1] == file), None)
            if member is None:
                raise DownloadError(
                    f"{self.fetched.path} holds no {file}, so it is not {source.name}; it holds "
                    f"{', '.join(names[:8])}"
                )
            self._files[role] = member

    def signature(self) -> dict[str, Any]:
        """Return the SHA-256 of the zip."""
        return {"sha256": self.fetched.sha256}

    def facts(self) -> dict[str, Any]:
        """Return name and SHA-256 of the zip, and whether a mirror stood in for the official address."""
        return {
            "name": f"{self.name}.zip",
            "sha256": self.fetched.sha256,
            "official": self.fetched.origin == OFFICIAL,
        }

    def chunks(self, bad: BadRows) -> Iterator[Chunk]:
        """Yield the ratings in file order."""
        file = self._files["ratings"].rsplit("/", 1)[-1]
        names: list[str] | None = _RATINGS
        delimiter = "\t"
        if self.name in _DAT:
            delimiter = ","
        elif self.name != "ml-100k":
            delimiter, names = ",", None
        columns = names or ["userId", "movieId", "rating", "timestamp"]
        if names is None:
            with self._whole():
                dialect = dialect_of(Text(self._open_ratings, file), delimiter)
        else:
            dialect = Dialect(delimiter, names, has_header=False)
        for table, rows in self._texts(self._open_ratings, file, dialect, columns, bad):
            for start in range(0, table.num_rows, CHUNK_ROWS):
                user, item, value, time = table.slice(start, CHUNK_ROWS).combine_chunks().columns
                roles = {"time": time.chunk(0), "value": value.chunk(0)}
                yield Chunk(file, rows[start : start + CHUNK_ROWS], user.chunk(0), item.chunk(0), **roles)

    def item_table(self, bad: BadRows) -> SideTable:
        """Return item_id, title, genres (joined by |, null without any) and year (int64, of the title)."""
        ids: list[str] = []
        titles: list[str] = []
        genres: list[str | None] = []
        with self._whole():
            for item, title, labels in self._movies(bad):
                ids.append(item)
                titles.append(title)
                genres.append(labels if labels and labels != NO_GENRES else None)
        years = [int(m[1]) if (m := _YEAR.search(t)) else None for t in titles]
        columns = {
            "item_id": pa.array(ids, pa.string()),
            "title": pa.array(titles, pa.string()),
            "genres": pa.array(genres, pa.string()),
            "year": pa.array(years, pa.int64()),
        }
        return SideTable(self._files["items"], pa.table(columns))

    def user_table(self, bad: BadRows) -> SideTable | None:
        """Return user_id, gender, age, occupation and zip of ml-100k and ml-1m, else None.

        Age is a number in ml-100k and an age group in ml-1m; occupation a name in ml-100k, a number in ml-1m.
        """
        if "users" not in self._files:
            return None
        if self.name == "ml-100k":
            order, separator = ["user_id", "age", "gender", "occupation", "zip"], "|"
        else:
            order, separator = ["user_id", "gender", "age", "occupation", "zip"], "::"
        with self._whole():
            rows = [r for _, r in self._split("users", separator, len(order), "iso-8859-1", bad)]
        columns = {name: pa.array([r[at] for r in rows], pa.string()) for at, name in enumerate(order)}
        if self.name == "ml-1m":
            columns["age"] = pa.array([_AGES_1M.get(r[2], r[2]) for r in rows], pa.string())
        return SideTable(self._files["users"], pa.table(columns))

    def _movies(self, bad: BadRows) -> Iterator[tuple[str, str, str]]:
        file = self._files["items"].rsplit("/", 1)[-1]
        if self.name == "ml-100k":
            for _, row in self._split("items", "|", 5 + len(GENRES_100K), "iso-8859-1", bad):
                flags = zip(GENRES_100K[1:], row[6:], strict=True)  # the first flag says that none is known
                yield row[0], row[1], "|".join(name for name, flag in flags if flag == "1")
        elif self.name in _DAT:
            for _, row in self._split("items", "::", 3, _DAT[self.name], bad):
                yield row[0], row[1], row[2]
        else:
            columns = ["movieId", "title", "genres"]
            dialect = dialect_of(Text(lambda: self._open("items"), file), ",")
            for table, _ in self._texts(lambda: self._open("items"), file, dialect, columns, bad):
                yield from zip(*(column.fill_null("").to_pylist() for column in table.columns), strict=True)

    def _texts(
        self, opener: Opener, file: str, dialect: Dialect, columns: list[str], bad: BadRows
    ) -> Iterator[tuple[pa.Table, IntArray]]:
        """Yield columns of a CSV file as text, with the line of each row."""
        missing = [c for c in columns if c not in dialect.names]
        if missing:
            raise DownloadError(
                f"{file} in {self.fetched.path} lacks columns {', '.join(missing)}; get the zip again"
            )
        places = [dialect.names.index(c) for c in columns]
        with self._whole():
            for batch, rows in csv_batches(Text(opener, file), dialect, places, bad):
                texts = {c: cells.text_of(batch.column(at)) for at, c in enumerate(columns)}
                yield tables.drop_undecoded(file, texts, rows, bad)

    def _split(
        self, role: str, separator: str, width: int, encoding: str, bad: BadRows
    ) -> Iterator[tuple[int, list[str]]]:
        """Yield line number and columns of a small file without quoting."""
        with self._open(role) as file:
            for number, line in enumerate(file, start=1):
                text = line.decode(encoding, "replace").rstrip("\r\n")
                if not text:
                    continue
                row = text.split(separator)
                if len(row) == width:
                    yield number, row
                else:
                    reason = f"with {len(row)} columns instead of {width}"
                    bad.add(self._files[role].rsplit("/", 1)[-1], [number], reason, [text[:80]])

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Turn what a damaged zip raises into an error that names it."""
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DownloadError(f"{self.fetched.path} is damaged ({error}); get the zip again") from None

    def _open(self, role: str) -> BinaryIO:
        return cast(BinaryIO, zipfile.ZipFile(self.fetched.path).open(self._files[role]))

    def _open_ratings(self) -> BinaryIO:
        member = self._open("ratings")
        return cast(BinaryIO, _OneByteSeparator(member)) if self.name in _DAT else member


class _OneByteSeparator(io.RawIOBase):
    """The bytes of a ``::``-separated file of numbers, with a comma for each separator."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while not self._rest:
            block = self._file.read(len(view))
            if not block:
                return 0
            # A block must not end inside a separator.
            while block.endswith(b":"):
                more = self._file.read(1)
                block += more
                if not more:
                    break
            self._rest = block.replace(b"::", b",")
        size = min(len(view), len(self._rest))
        view[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

"""Which files a path names, the bytes in them, and what is wrong with a file that can not be read."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import io
import lzma
import os
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from twotower.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Between the columns of text files, unless their header says otherwise."""
_PACKED: dict[str, Callable[[Path], Any]] = {
    "": io.FileIO,
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
    ".lz4": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "lz4"),
}
PARQUET = (".parquet", ".pq")
SUFFIXES = (*(kind + packing for packing in _PACKED for kind in DELIMITERS), *PARQUET)
"""Of tables."""
_MAGIC = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip file or a spreadsheet",
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\x04\x22\x4d\x18": "compressed with lz4",
}
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
Opener = Callable[[], BinaryIO]


def find_files(path: str, setting: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return the files that a path names, sorted by name: a file, a folder, or a glob.

    A folder is read whole: a file in it that can not be read is refused, not passed over. Only names that
    begin with a dot or an underscore, such as ``_SUCCESS``, are no data.

    Args:
        path: the path.
        setting: what it was given by, for messages.
        suffixes: of the files wanted: CSV and Parquet.

    Raises:
        DataError: there are none, or one of them is of another type.
    """
    expanded = os.path.expanduser(path)
    root = Path(expanded)
    if root.is_dir():
        return _in_folder(root, setting, suffixes)
    if root.is_file():
        named = [root]
    else:
        named = [Path(p) for p in glob.glob(expanded, recursive=True)]
        named = [p for p in named if not _hidden(p.name) or _hidden(root.name)]
        if not named:
            raise DataError(
                f"{setting}: {path!r} names no file (from {os.getcwd()}); give a CSV or Parquet file, a "
                "folder or a glob"
            )
    found: set[Path] = set()
    for file in sorted(named):
        if file.is_dir():
            # What Spark writes as a table is a folder; under ** its files are matched by themselves.
            found.update([] if "**" in path else _in_folder(file, setting, suffixes))
        elif suffix_of(file, suffixes) is None:
            raise DataError(
                f"{setting}: {file} is of no kind that can be read; use {', '.join(suffixes)}, or name the "
                "other files with a glob"
            )
        else:
            found.add(file)
    return sorted(found)


def partitions(path: str, file: Path) -> dict[str, str | None]:
    """Return the columns that the folders of a file stand for, such as ``date=2024-01-01``.

    Args:
        path: what named the file: itself, a folder, or a glob. Only folders below it count.
        file: one of the files found.
    """
    root = Path(os.path.expanduser(path))
    while glob.has_magic(str(root)):
        root = root.parent
    with contextlib.suppress(ValueError):
        pairs = [part.split("=", 1) for part in file.parent.relative_to(root).parts if "=" in part]
        values = {name: urllib.parse.unquote(value) for name, value in pairs if name}
        return {name: None if value == _NO_VALUE else value for name, value in values.items()}
    return {}


def stamp(path: Path) -> list[Any]:
    """Return what changes when a file is written again: absolute path, size and time of change."""
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def suffix_of(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str | None:
    """Return the suffix of a file that is one of ``suffixes``."""
    name = path.name.lower()
    return next((s for s in suffixes if name.endswith(s)), None)


def opener(path: Path) -> Opener:
    """Return a function that opens a file's bytes, unpacked."""
    packing = next((p for p in _PACKED if p and path.name.lower().endswith(p)), "")
    return lambda: cast(BinaryIO, _PACKED[packing](path))


@contextlib.contextmanager
def readable(name: str | Path, kind: str = "file") -> Iterator[None]:
    """Turn what a damaged, false or forbidden file raises into one line that names it.

    Raises:
        DataError: with the file, its cause and the remedy.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{name} is not there any more; give an existing file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(
            f"{name} can not be opened ({error.strerror}); give a file that can be read"
        ) from None
    except EOFError:
        raise DataError(
            f"{name} ends before its compressed data does: it is truncated; get or write it again"
        ) from None
    except (OSError, zlib.error, lzma.LZMAError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        text = " ".join(str(error).split())
        if "runcated" in text:
            text = f"it is truncated: {text}"
        raise DataError(f"{name} is not a readable {kind} ({text}); get or write it again") from None


def refuse_other_kind(name: str, head: bytes) -> None:
    """Refuse the bytes of a file that is not the text that its name says.

    Raises:
        DataError: it is compressed, a table of another kind, or UTF-16 without a mark of it.
    """
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{name} is {kind}, not text; name it by its kind ({', '.join(SUFFIXES)})")
    if b"\0" in head:
        raise DataError(
            f"{name} holds zero bytes, so it is no UTF-8 text; if it is UTF-16, set data.source.encoding: "
            "utf-16-le (or -be)"
        )


def _in_folder(root: Path, setting: str, suffixes: Sequence[str]) -> list[Path]:
    inside = [p for p in sorted(root.rglob("*")) if not p.is_dir()]
    inside = [p for p in inside if not any(map(_hidden, p.relative_to(root).parts))]
    others = [str(p.relative_to(root)) for p in inside if suffix_of(p, suffixes) is None]
    if len(others) == len(inside):
        raise DataError(f"{setting}: folder {root} holds no file of {', '.join(suffixes)}")
    if others:
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        raise DataError(
            f"{setting}: folder {root} also holds {', '.join(others[:5])}{more}, of no kind that can be read "
            f"({', '.join(suffixes)}); move what is no data elsewhere, or name the data with a glob such as "
            f"{root}/*{suffix_of(next(p for p in inside if suffix_of(p, suffixes)), suffixes)}"
        )
    return inside


def _hidden(name: str) -> bool:
    return name.startswith((".", "_"))

"""One module per kind of source; each yields chunks of interactions and its item and user tables.

The sections of ``data.source`` name the functions below.
"""

from __future__ import annotations

from twotower.config import Config, FilesSource, GeneratedSource, LightGCNSource, MovieLensSource
from twotower.data.chunks import RawSource
from twotower.data.sources.files import Files
from twotower.data.sources.generated import Generated
from twotower.data.sources.lightgcn import LightGCN
from twotower.data.sources.movielens import MovieLens
from twotower.registry import imported


def open_source(config: Config) -> RawSource:
    """Return the configured source, fetched where it has to be.

    Raises:
        ConfigError: the source section is not valid.
        DataError: the raw data is missing or unreadable.
    """
    source = config.data.source
    opened: RawSource = imported(type(source).implementation)(source, config.data.cache, config.mirror)
    return opened


def open_movielens(source: MovieLensSource, cache: str, mirror: str | None) -> RawSource:
    """Return a MovieLens data set, downloaded into the cache."""
    return MovieLens(source, cache, mirror)


def open_files(source: FilesSource, cache: str, mirror: str | None) -> RawSource:
    """Return files."""
    return Files(source)


def open_lightgcn(source: LightGCNSource, cache: str, mirror: str | None) -> RawSource:
    """Return files of the LightGCN text format."""
    return LightGCN(source)


def open_generated(source: GeneratedSource, cache: str, mirror: str | None) -> RawSource:
    """Return a generated catalogue and its interactions."""
    return Generated(source)

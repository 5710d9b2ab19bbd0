"""One module per kind of source; each yields chunks of interactions and its item and user tables."""

from __future__ import annotations

from twotower.config import Config, FilesSource, GeneratedSource, LightGCNSource, MovieLensSource
from twotower.data.chunks import RawSource
from twotower.data.sources.files import Files
from twotower.data.sources.generated import Generated
from twotower.data.sources.lightgcn import LightGCN
from twotower.data.sources.movielens import MovieLens
from twotower.errors import ConfigError


def open_source(config: Config) -> RawSource:
    """Return the configured source, fetched where it has to be.

    Raises:
        ConfigError: the source section is not valid.
        DataError: the raw data is missing or unreadable.
    """
    source = config.data.source
    if isinstance(source, MovieLensSource):
        return MovieLens(source, config.data.cache, config.mirror)
    if isinstance(source, FilesSource):
        return Files(source)
    if isinstance(source, LightGCNSource):
        return LightGCN(source)
    if isinstance(source, GeneratedSource):
        return Generated(source)
    raise ConfigError(f"data.source.kind {source!r} is not known")

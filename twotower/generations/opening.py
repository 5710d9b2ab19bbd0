"""Which store a configuration, a path or a URL means."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config
from twotower.errors import ConfigError
from twotower.generations.store import Store


def open_store(config: Config) -> Store:
    """Return the store of a configuration: a folder below its root, or ``storage.store`` with that as cache.

    Raises:
        ConfigError: ``storage.store`` can not be used.
    """
    return store_at(config.storage.store or str(config.store), config.store)


def store_at(place: str, cache: Path | str | None = None) -> Store:
    """Return the store at a path or URL; nothing is read yet.

    Args:
        place: path of a folder, or ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``.
        cache: local folder for the generations of a URL.

    Raises:
        ConfigError: the URL can not be used, or has no cache.
    """
    if "://" not in place:
        return Store(place)
    if cache is None:
        raise ConfigError(f"the store {place} is read through a local folder; give one as its cache")
    # Its client is an extra that local stores do without.
    from twotower.generations.bucket import Bucket

    return Store(Bucket(place, cache))

"""Keys and bytes in a bucket of S3 or Google Cloud Storage: what a store there needs, and no more.

``obstore`` does the work: retries, uploads in parts, and the store's own conditional puts. Credentials and
endpoint come from the environment, as other tools read them.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from twotower.config.service import check_store_url
from twotower.errors import ArtefactError, ConfigError, UnavailableError

T = TypeVar("T")
R = TypeVar("R")
_THREADS = 8
_PART_BYTES = 16 << 20
_MAX_PARTS = 9_000
_BLOCK_BYTES = 8 << 20
_HINTS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a role of the machine), AWS_REGION and, for other "
    "stores than Amazon's, AWS_ENDPOINT_URL; AWS_ALLOW_HTTP=true where that begins with http://",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (or a service account of the machine)",
}


@dataclass(frozen=True)
class Found:
    """An object in a listing."""

    key: str
    num_bytes: int
    modified: datetime.datetime
    """When it was put, by the store's clock."""


@dataclass(frozen=True)
class Content:
    """The bytes of an object, and what a conditional put needs to replace exactly these."""

    data: bytes
    version: dict[str, str]


class Objects:
    """The objects below a URL; keys are relative to it.

    What the bucket does not answer, or does not allow, is an ``UnavailableError``.
    """

    def __init__(self, url: str) -> None:
        """Take the place; nothing is sent to it.

        Args:
            url: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``.

        Raises:
            ConfigError: it is no such URL, obstore is missing, or the environment is not understood.
        """
        try:
            check_store_url(url)
        except ValueError as error:
            raise ConfigError(f"storage.store: {error}") from None
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise ConfigError(
                f"storage.store ({url}) needs the package obstore: pip install 'twotower[objectstore]'"
            ) from None
        self.url = url.rstrip("/")
        self._api: Any = obstore
        try:
            self._store: Any = from_url(self.url)
        except obstore.exceptions.BaseError as error:
            raise ConfigError(f"{self.url} can not be used: {_brief(error)}; {self._hint}") from None

    def get(self, key: str) -> Content | None:
        """Return an object; None where there is none."""
        with self._plain_errors(f"reading {key}"):
            try:
                answer = self._api.get(self._store, key)
                data = bytes(answer.bytes())
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None
        version = {name: answer.meta[name] for name in ("e_tag", "version") if answer.meta.get(name)}
        return Content(data, version)

    def exists(self, key: str) -> bool:
        """Return whether there is an object."""
        with self._plain_errors(f"looking for {key}"):
            try:
                self._api.head(self._store, key)
            except FileNotFoundError as error:
                self._check_bucket(error)
                return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whatever is there."""
        with self._plain_errors(f"writing {key}"):
            self._api.put(self._store, key, data)

    def swap(self, key: str, data: bytes, replaced: Content | None) -> bool:
        """Write an object if nobody else has written it since; returns whether that was so.

        Args:
            key: of the object.
            data: its new bytes.
            replaced: what it must still be; None when it must not be there.
        """
        errors = self._api.exceptions
        with self._plain_errors(f"writing {key}"):
            try:
                mode = "create" if replaced is None else replaced.version
                self._api.put(self._store, key, data, mode=mode)
            except (errors.AlreadyExistsError, errors.PreconditionError):
                # A request that is repeated after a lost answer meets what it wrote itself.
                now = self.get(key)
                return now is not None and now.data == data
        return True

    def upload(self, key: str, path: Path) -> None:
        """Write a file as an object; it appears whole or not at all."""
        part = max(_PART_BYTES, path.stat().st_size // _MAX_PARTS)
        with self._plain_errors(f"writing {key}"):
            self._api.put(self._store, key, path, chunk_size=part)

    def download(self, key: str, path: Path) -> tuple[int, str]:
        """Write an object into a new file; returns its bytes and SHA-256 as they arrived.

        Raises:
            UnavailableError: it is not there, or can not be read.
        """
        digest, num_bytes = hashlib.sha256(), 0
        with self._plain_errors(f"reading {key}"):
            try:
                stream = self._api.get(self._store, key).stream(min_chunk_size=_BLOCK_BYTES)
                with open(path, "xb") as file:
                    for block in stream:
                        file.write(block)
                        digest.update(block)
                        num_bytes += len(block)
            except FileNotFoundError as error:
                self._check_bucket(error)
                raise UnavailableError(f"{self.url}/{key} is missing") from None
        return num_bytes, digest.hexdigest()

    def list(self, prefix: str) -> list[Found]:
        """Return all objects below a prefix that ends with a slash."""
        with self._plain_errors(f"listing {prefix}"):
            pages = self._api.list(self._store, prefix)
            return [Found(o["path"], o["size"], o["last_modified"]) for page in pages for o in page]

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; those that are not there are passed over."""
        with self._plain_errors(f"removing {len(keys)} objects"):
            if keys:
                self._api.delete(self._store, list(keys))

    @property
    def _hint(self) -> str:
        return f"the environment says who asks and where: {_HINTS[self.url[:2]]}"

    def _check_bucket(self, error: Exception) -> None:
        """A bucket that is not there looks like an object that is not."""
        if "NoSuchBucket" in str(error):
            raise ArtefactError(
                f"{self.url}: there is no such bucket; make it, or correct storage.store"
            ) from None

    @contextlib.contextmanager
    def _plain_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (self._api.exceptions.BaseError, PermissionError) as error:
            self._check_bucket(error)
            raise UnavailableError(f"{self.url}: {what} failed: {_brief(error)}. {self._hint}") from None


def at_once(call: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """Call a function that waits for the network on several values at a time; answers in their order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(call, values))


def _brief(error: Exception) -> str:
    """Return what an error of obstore says, without its dump of internals."""
    return str(error).partition("\n\nDebug source")[0].strip()

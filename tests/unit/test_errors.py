"""Which errors may pass, so that what failed is tried again."""

from __future__ import annotations

import errno

import pytest

from twotower.errors import ArtefactError, TwotowerError, UnavailableError, may_pass


def wrapped(cause: Exception) -> TwotowerError:
    """Return the error that a person reads in place of another."""
    try:
        try:
            raise cause
        except Exception as error:
            raise ArtefactError(f"shard.json can not be read ({error})") from None
    except ArtefactError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        RuntimeError("FAISS"),
        UnavailableError("s3://bucket: reading CURRENT failed"),
        wrapped(OSError(errno.EIO, "Input/output error")),
        wrapped(OSError(errno.EMFILE, "Too many open files")),
        wrapped(TimeoutError(errno.ETIMEDOUT, "Connection timed out")),
    ],
    ids=repr,
)
def test_what_may_pass(error: Exception) -> None:
    assert may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        ArtefactError("index.faiss is damaged"),
        wrapped(ValueError("no JSON")),
        wrapped(KeyError("rows")),
        wrapped(FileNotFoundError(errno.ENOENT, "No such file or directory")),
        wrapped(IsADirectoryError(errno.EISDIR, "Is a directory")),
        # Arrow reports a file of nonsense so.
        wrapped(OSError("Invalid IPC message: negative bodyLength")),
    ],
    ids=repr,
)
def test_what_stays(error: Exception) -> None:
    assert not may_pass(error)

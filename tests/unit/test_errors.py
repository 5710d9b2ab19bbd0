"""Which errors may pass, so that what failed is tried again."""

from __future__ import annotations

import errno

import pytest

from twotower.errors import ArtefactError, TwotowerError, UnavailableError, may_pass, system_error


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
        wrapped(PermissionError(errno.EACCES, "Permission denied")),
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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("'f' failed: could not open /store/x: y for reading: Too many open files", errno.EMFILE),
        ("'address != MAP_FAILED' failed: could not mmap(): Cannot allocate memory", errno.ENOMEM),
        ("unable to open file </store/m> in read-only mode: Too many open files (24)", errno.EMFILE),
        ("unable to mmap 64 bytes from file </store/m>: Cannot allocate memory (12)", errno.ENOMEM),
        ("could not open /store/x for reading: Permission denied", errno.EACCES),
        # A file that is too short; what the system said last was of another file.
        ("'nread == (size)' failed: read error in /store/x: 10 != 20 (Too many open files)", None),
        ("Index type 0xffffffff not recognized", None),
        ("could not open the door: nobody there", None),
    ],
)
def test_what_the_system_refused_is_read_from_the_text_of_libraries(text: str, number: int | None) -> None:
    found = system_error(RuntimeError(f"Error in faiss::FileIOReader at io.cpp:69: Error: {text}"))
    assert (None if found is None else found.errno) == number

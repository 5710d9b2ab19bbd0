"""What the system refuses, in one line: by kind, however it is wrapped."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from ray.exceptions import (
    ActorDiedError,
    ObjectStoreFullError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from twotower.errors import ArtefactError, ConfigError, SystemFaultError, TwotowerError, may_pass
from twotower.faults import explain
from twotower.index.build import write_index


class _TrainingFailed(Exception):
    """Has the shape of Ray Train's error."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("Worker 0 failed:\n  File ...\n")
        self.worker_failures = failures


def task_error(cause: Exception) -> Exception:
    return RayTaskError("f", "Traceback ...\n  File ...", cause).as_instanceof_cause()


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 256 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("this user can not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that can only be read."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("this user can not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def told(action) -> TwotowerError:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the very point is that it may be any
        action()
    found = explain(caught.value)
    assert found is not None, repr(caught.value)
    assert "\n" not in str(found)
    return found


def _faiss(folder: Path) -> None:
    index = faiss.IndexFlatIP(64)
    index.add(np.ones((10_000, 64), dtype=np.float32))
    write_index(index, folder / "index.faiss")


def _faiss_at_the_end(folder: Path) -> None:
    (folder / "fill").write_bytes(bytes((256 << 10) - 4096))
    index = faiss.IndexFlatIP(8)
    index.add(np.ones((200, 8), dtype=np.float32))
    write_index(index, folder / "index.faiss")


WRITERS = {
    "python": lambda folder: (folder / "a").write_bytes(bytes(1 << 20)),
    "arrow": lambda folder: pq.write_table(
        pa.table({"a": np.random.default_rng(0).random(1 << 18)}), folder / "a.parquet"
    ),
    "torch": lambda folder: torch.save({"a": torch.zeros(1 << 18)}, folder / "a.pt"),
    "safetensors": lambda folder: safetensors.numpy.save_file(
        {"a": np.zeros(1 << 18, dtype=np.float32)}, folder / "a.safetensors"
    ),
    "faiss": _faiss,
    "faiss, its last bytes": _faiss_at_the_end,
    "copy": lambda folder: (
        shutil.copy(torch.__file__, folder / "a") and (folder / "b").write_bytes(bytes(1 << 19))
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_whoever_wrote(full, writer):
    error = told(lambda: WRITERS[writer](full))
    assert "space" in str(error)
    assert "storage.root" in str(error)
    assert isinstance(error, SystemFaultError)
    assert may_pass(error)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_can_only_be_read_is_told_whoever_wrote(read_only, writer):
    error = told(lambda: WRITERS[writer](read_only))
    assert "only be read" in str(error)
    # torch does not say which file.
    assert str(read_only) in str(error) or writer == "torch"
    assert error.exit_code == 2


def test_a_limit_of_file_sizes_is_told(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        error = told(lambda: WRITERS["python"](tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit -f" in str(error)


def test_a_limit_of_open_files_is_told(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), before[1]))
    try:
        error = told(lambda: [os.open(tmp_path, os.O_RDONLY) for _ in range(9)])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "ulimit -n" in str(error)


def test_memory_that_is_not_there_is_told_whoever_asked():
    for action in (
        lambda: np.zeros((1 << 45,), dtype=np.float64),
        lambda: torch.zeros(1 << 45, dtype=torch.float64),
        lambda: pa.allocate_buffer(1 << 50),
        lambda: faiss.IndexFlatIP(1 << 10).add_c(1 << 50, None),
    ):
        error = told(action)
        assert str(error).startswith("out of memory")
        assert "larger machine" in str(error)


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (errno.ENOSPC, 1, "no space"),
        (errno.EDQUOT, 1, "quota"),
        (errno.EFBIG, 1, "ulimit -f"),
        (errno.EMFILE, 1, "ulimit -n"),
        (errno.ENFILE, 1, "files are open"),
        (errno.EIO, 1, "look at the disk"),
        (errno.ESTALE, 1, "mount it again"),
        (errno.ENOMEM, 1, "out of memory"),
        (errno.EROFS, 2, "only be read"),
        (errno.EACCES, 2, "permission is denied"),
        (errno.EPERM, 2, "permission is denied"),
        (errno.ENOENT, 2, "no such file"),
        (errno.ENOTDIR, 2, "not a folder"),
        (errno.EISDIR, 2, "is a folder"),
        (errno.EEXIST, 2, "remove it"),
        (errno.ENOTEMPTY, 2, "not empty"),
        (errno.ENAMETOOLONG, 2, "too long"),
        (errno.ELOOP, 2, "links"),
        (errno.ENXIO, 1, "No such device"),
    ],
)
def test_every_number_of_the_system_has_its_line_through_every_wrapper(number, code, says):
    plain = OSError(number, os.strerror(number), "/data/runs/a.parquet")
    for error in (
        plain,
        task_error(plain),
        _TrainingFailed({0: task_error(plain)}),
        caused(RuntimeError("stage failed"), task_error(plain)),
    ):
        found = explain(error)
        assert found is not None
        assert says in str(found)
        assert number == errno.ENOMEM or "/data/runs/a.parquet" in str(found)
        assert "\n" not in str(found)
        assert "Traceback" not in str(found)
        assert found.exit_code == code


def test_an_error_for_people_stays_as_it_is_through_every_wrapper():
    own = ArtefactError("index.faiss is damaged; build it again")
    for error in (own, task_error(own), _TrainingFailed({0: task_error(own)}), caused(ValueError("x"), own)):
        assert str(explain(error)) == str(own)
        assert type(explain(error)) is ArtefactError


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node"),
            "out of mem",
        ),
        (ObjectStoreFullError("Failed to put object"), "object store is full"),
        (WorkerCrashedError(), "a process of Ray died"),
        (ActorDiedError(), "a process of Ray died"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (TimeoutError("HTTP proxies not available after 60s."), "not available"),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "no space",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (OSError("Arrow could not do it\nfor a reason of two lines"), "--debug"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_may_pass_is_told_and_has_exit_code_1(error, says):
    for wrapped in (error, task_error(error)):
        found = explain(wrapped)
        assert isinstance(found, SystemFaultError)
        assert says in str(found)
        assert "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        KeyError("x"),
        RuntimeError("a tensor of the wrong shape"),
        ValueError("n"),
        AssertionError(),
    ],
    ids=repr,
)
def test_a_defect_is_nothing_that_the_system_refused(error):
    assert explain(error) is None
    assert explain(task_error(error)) is None


def test_configuration_and_system_are_told_apart():
    assert isinstance(explain(PermissionError(errno.EACCES, "Permission denied", "/x")), ConfigError)
    assert isinstance(explain(OSError(errno.ENOSPC, "No space left on device", "/x")), SystemFaultError)

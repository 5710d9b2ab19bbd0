"""SHA-256 of files, in the calling thread and aside."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower import hashing
from twotower.hashing import hashing_aside, sha256_file

pytestmark = pytest.mark.unit

DATA = bytes(range(256)) * 9_000
RIGHT = hashlib.sha256(DATA).hexdigest()

aside_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the policy SCHED_IDLE")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Larger than a block, under a name that needs care."""
    path = tmp_path / "ein wért\n\udcff"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """Whoever reads it waits until somebody writes."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def helpers(parent: int) -> list[int]:
    """Return the processes that a process hashes in."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == parent and hashing.__file__.encode() in command:
                found.append(int(entry.name))
    return found


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == b""
    except OSError:
        return True


def wait_for(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_larger_than_a_block(file: Path) -> None:
    assert sha256_file(file) == RIGHT


def test_aside_gives_the_same(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hashing_aside() as sha256:
        # Nobody else can have found these.
        monkeypatch.setattr(hashing, "sha256_file", None)
        assert sha256(file) == RIGHT
        monkeypatch.chdir(tmp_path)
        assert sha256(Path(file.name)) == RIGHT
        assert len(helpers(os.getpid())) == 1
    assert not helpers(os.getpid())


def test_small_files_need_no_process(file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "small").write_bytes(DATA[: hashing._SMALL_BYTES])
    (tmp_path / "larger").write_bytes(DATA[: hashing._SMALL_BYTES + 1])
    with hashing_aside() as sha256:
        assert sha256(tmp_path / "empty") == hashlib.sha256().hexdigest()
        assert sha256(tmp_path / "small") == hashlib.sha256(DATA[: hashing._SMALL_BYTES]).hexdigest()
        assert not helpers(os.getpid())
        assert sha256(tmp_path / "larger") == hashlib.sha256(DATA[: hashing._SMALL_BYTES + 1]).hexdigest()
        assert len(helpers(os.getpid())) == 1


@aside_only
def test_aside_is_a_process_that_takes_what_others_leave(fifo: Path) -> None:
    found: list[str] = []
    with hashing_aside() as sha256:
        thread = threading.Thread(target=lambda: found.append(sha256(fifo)))
        thread.start()
        wait_for(lambda: len(helpers(os.getpid())) == 1)
        (pid,) = helpers(os.getpid())
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        fifo.write_bytes(DATA)
        thread.join(timeout=20)
    assert found == [RIGHT]
    assert not helpers(os.getpid())


@aside_only
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_what_is_not_hashed_aside_is_hashed_here(
    end: signal.Signals, fifo: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_PATIENCE_S", 1.0)
    found: list[str] = []
    with hashing_aside() as sha256:
        assert sha256(file) == RIGHT
        (pid,) = helpers(os.getpid())
        os.kill(pid, end)
        thread = threading.Thread(target=lambda: found.append(sha256(fifo)))
        thread.start()
        # Only once nobody else can take what is written.
        wait_for(lambda: not helpers(os.getpid()))
        fifo.write_bytes(DATA)
        thread.join(timeout=20)
        assert found == [RIGHT]
        assert sha256(file) == RIGHT
        assert not helpers(os.getpid())


def test_a_file_that_can_not_be_read_is_an_error_as_ever(file: Path, tmp_path: Path) -> None:
    with hashing_aside() as sha256:
        with pytest.raises(FileNotFoundError, match="missing"):
            sha256(tmp_path / "missing")
        with pytest.raises(IsADirectoryError):
            sha256(tmp_path)
        assert sha256(file) == RIGHT


def test_without_chrt_the_calling_thread_hashes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with hashing_aside() as sha256:
        assert sha256(file) == RIGHT
        assert not helpers(os.getpid())


@aside_only
def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    # Minutes of work, and no byte on the disk.
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(1 << 39)
    program = (
        "import sys; from pathlib import Path; from twotower.hashing import hashing_aside\n"
        "with hashing_aside() as sha256: sha256(Path(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "sparse")])
    wait_for(lambda: helpers(parent.pid))
    (pid,) = helpers(parent.pid)
    time.sleep(0.2)
    assert not has_ended(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: has_ended(pid))


def test_a_process_whose_parent_is_gone_before_it_looks_ends_too(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(1 << 39)
    name = str(tmp_path / "sparse").encode()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    found = subprocess.run(
        [sys.executable, "-I", "-S", hashing.__file__, str(gone.pid)],
        input=len(name).to_bytes(4, "little") + name,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert found.stdout == b""

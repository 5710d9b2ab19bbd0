"""SHA-256 of files: in the thread that asks, or aside, in a process that takes only what others leave.

A process that answers requests on few CPUs hashes aside. A woken thread waits for up to a tick of the kernel
(4 ms) behind one that computes, even one of a low priority, but not behind one of Linux's policy SCHED_IDLE;
and no thread of that process waits for the lock of Python's interpreter while it has no CPU.

Run as a program this file is that process. It imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_BLOCK_BYTES = 1 << 20
_SMALL_BYTES = 256 << 10
"""Of a file as small as this, handing it over takes longer than hashing it (under a millisecond)."""
_PATIENCE_S, _SLOWEST_BYTES_PER_S = 5.0, 50e6
"""How long a file may take aside: where no CPU is ever idle it would take for ever."""
_HEX_DIGITS = 64


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    return _digest(path, lambda: None)


@contextlib.contextmanager
def hashing_aside() -> Iterator[Callable[[Path], str]]:
    """Provide what ``sha256_file`` does, but for small files done in a process of the lowest priority.

    A file that it does not hash in time, and all after it, are hashed in the calling thread. Only one thread
    at a time may call what is provided. The process ends with this context, or with its parent.
    """
    with contextlib.ExitStack() as stack:
        process: subprocess.Popen[bytes] | None = None
        tried = False

        def sha256(path: Path) -> str:
            nonlocal process, tried
            if _is_small(path):
                return sha256_file(path)
            if not tried:
                tried = True
                with contextlib.suppress(OSError):
                    process = stack.enter_context(_started())
            if process is not None:
                found = _asked(process, path)
                if found is not None:
                    return found
                process.kill()
                process = None
            return sha256_file(path)

        yield sha256


def _is_small(path: Path) -> bool:
    found = path.stat()
    return stat.S_ISREG(found.st_mode) and found.st_size <= _SMALL_BYTES


@contextlib.contextmanager
def _started() -> Iterator[subprocess.Popen[bytes]]:
    # Where there is no chrt or no such policy, as on macOS, the calling thread hashes.
    command = ["chrt", "--idle", "0", sys.executable, "-I", "-S", __file__, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            yield process
        finally:
            process.kill()


def _asked(process: subprocess.Popen[bytes], path: Path) -> str | None:
    """Return what the process finds, or None where it finds nothing or takes too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    name = os.fsencode(path.absolute())
    answer = select.poll()
    answer.register(process.stdout, select.POLLIN)
    try:
        patience_s = _PATIENCE_S + path.stat().st_size / _SLOWEST_BYTES_PER_S
        process.stdin.write(len(name).to_bytes(4, "little") + name)
        # A pipe takes and gives as few bytes as these at once.
        found = process.stdout.read(_HEX_DIGITS) if answer.poll(patience_s * 1e3) else b""
    except OSError:
        return None
    return found.decode() if len(found) == _HEX_DIGITS else None


def _digest(path: Path, between: Callable[[], None]) -> str:
    """Return the SHA-256 of a file, with a call between two blocks of it."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        # One piece of memory for all blocks: to map and unmap one for each holds up other threads' memory.
        size = os.fstat(file.fileno()).st_size
        block = memoryview(bytearray(min(_BLOCK_BYTES, size) or _BLOCK_BYTES))
        while count := file.readinto(block):
            digest.update(block[:count])
            between()
    return digest.hexdigest()


def _main(parent: int) -> None:
    """Answer paths from the standard input, each behind its length in four bytes, with digests.

    Args:
        parent: process id of whoever asks. It may be gone already, so it is not asked for here.
    """

    def end_with_parent() -> None:
        if os.getppid() != parent:
            sys.exit()

    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    while length := asked.read(4):
        # A file that can not be read ends this process: whoever asks finds out why.
        path = Path(os.fsdecode(asked.read(int.from_bytes(length, "little"))))
        answers.write(_digest(path, end_with_parent).encode())
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        _main(int(sys.argv[1]))

"""Work that is killed in the middle, for real: a process of its own gets SIGKILL before a change it makes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree")


def killed_before(number: int, work: Callable[[], object]) -> bool:
    """Run work in a child that kills itself before its change of that number, from 1, to a file system.

    Returns:
        whether it came so far; False where it ended before.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, arguments: object) -> None:
            nonlocal seen
            if event in CHANGES:
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the child ended with {status}"
    return status == signal.SIGKILL


def files_below(root: Path) -> dict[str, bytes | None]:
    """Every file below a folder but locks, with its content; None for folders."""
    return {
        p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else None
        for p in sorted(root.rglob("*"))
        if not p.name.endswith(".lock")
    }

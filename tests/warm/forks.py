"""The processes that are forked.

The first has imported all but Ray. For each job of each Ray it forks one that imports Ray with the variables
of that job, and that is forked for every worker of the job.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.warm.asking import FIXED, receive, send
from tests.warm.modules import PLAIN, WITH_RAY

_LOOK_S = 1.0
"""How often a process looks whether its Ray is still there."""


def load(names: Iterable[str]) -> None:
    """Import modules, and make what they hold cheap to share."""
    for name in names:
        importlib.import_module(name)
    # Arrow's allocator starts its own again in a fork.
    tasks = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    others = [name for name in tasks if name != "jemalloc_bg_thd"]
    assert len(others) == 1, f"a fork would lack a thread of {others}"
    gc.collect()
    gc.freeze()


def bound(path: Path) -> socket.socket:
    """Return a socket on which forks can be asked for from now on, answered or not."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1000)
    return listener


def share_out(listener: socket.socket, folder: Path) -> None:
    """Say to everybody which process to ask, and fork it for the first, until standard input closes."""
    known: set[Path] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while sys.stdin not in [key.fileobj for key, _ in selector.select()]:
            connection, _ = listener.accept()
            fixed, files = receive(connection)
            for file in files:
                os.close(file)
            path = folder / "-".join(fixed[name] for name in FIXED)
            if path not in known:
                known.add(path)
                own = bound(path)
                if os.fork() == 0:
                    listener.close()
                    connection.close()
                    fork_workers(own, fixed)
                    os._exit(0)
                own.close()
            send(connection, str(path))
            connection.close()


def fork_workers(listener: socket.socket, fixed: dict[str, str]) -> None:
    """Fork for every worker of one job, until its Ray has ended."""
    os.environ.update(fixed)
    load(WITH_RAY)
    path = Path(importlib.import_module("ray").__file__ or "").parent / "_private/workers/default_worker.py"
    program = compile(path.read_text(), str(path), "exec")
    raylet = Path("/proc") / fixed["RAY_RAYLET_PID"]
    listener.settimeout(_LOOK_S)
    while raylet.exists():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        request, files = receive(connection)
        if os.fork() == 0:
            listener.close()
            # The connection stays open as long as this process lives, which tells who asked.
            os._exit(become_worker(program, request, files))
        connection.close()
        for file in files:
            os.close(file)


def become_worker(program: types.CodeType, request: dict[str, Any], files: list[int]) -> int:
    """Run Ray's own program with what was asked for, and return how it ended."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A signal to the group of who asked reaches this process too.
    os.setpgid(0, request["group"])
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.modules["numpy"].random.seed()
    sys.argv = [program.co_filename, *request["arguments"]]
    main = types.ModuleType("__main__")
    main.__file__ = program.co_filename
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(program, main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Not the end of every module, which would copy all the memory that is shared.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def main() -> None:
    """Import, and fork for those who ask."""
    path = Path(sys.argv[1])
    listener = bound(path)
    load(PLAIN)
    assert "ray" not in sys.modules
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nobody waits for the forks.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    share_out(listener, path.parent)


if __name__ == "__main__":
    main()

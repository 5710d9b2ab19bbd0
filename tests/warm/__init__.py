"""Ray's workers, forked from a process that has imported what they need.

A worker that Ray starts imports Ray, and then with its first task torch, FAISS and Ray Train, Data or Serve:
two to four seconds of a CPU, for every controller, trainer, encoder and replica of every test. Ray is told
to start ``setup_worker.py`` or ``worker.py`` of this folder instead of its own files of these names. They ask
the processes of ``forks.py`` for a fork that has their arguments, environment, folder and open files, and
that runs Ray's own ``default_worker.py``; they live as long as it does. All else is Ray's: it knows the fork
by the number that it says when it registers, and ends it by that.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from twotower.cluster.processes import Process

_HERE = Path(__file__).parent
SOCKET = "TWOTOWER_TEST_FORKS"
"""Environment variable with the path of the socket on which forks are asked for."""


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Let a Ray that starts in this process, or by ``warm_ray`` in a child of it, fork its workers."""
    folder = Path(tempfile.mkdtemp(prefix="tt"))
    os.environ[SOCKET] = str(folder / "forks")
    # It ends when its standard input closes, which also happens when this process is killed. Ctrl-C is not
    # for its group, so that Ray ends the workers as it ends its own.
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.warm.forks", os.environ[SOCKET]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n", "it could not import, and says why above"
        with warm_ray():
            yield
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)
        del os.environ[SOCKET]
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def warm_ray() -> Iterator[None]:
    """Let a Ray that starts in this process, inside the block, fork its workers."""
    from ray._private import parameter

    with pytest.MonkeyPatch.context() as patch:
        files = {name: str(_HERE / f"{name.removesuffix('_path')}.py") for name in _PATHS}
        patch.setattr(parameter, "RayParams", functools.partial(parameter.RayParams, **files))
        yield


def forks_for(askers: Iterable[Process]) -> set[Process]:
    """Return the forks that processes have asked for: of their process groups, and not below them."""
    asked = {_group(process.pid) for process in askers} - {None, os.getpgrp()}
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {process for pid in pids if _group(pid) in asked and (process := Process.of(pid))}


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


_PATHS = ("worker_path", "setup_worker_path")

"""Python in a process of its own that may be killed, forked from one that has imported what it needs.

A Python that is started anew imports torch, FAISS and pyarrow for two seconds of a CPU before its first line.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

START = "forkserver"
"""How processes of tests start; torch.multiprocessing takes it too."""
context = multiprocessing.get_context(START)
context.set_forkserver_preload(
    [
        "tests.apart",
        "tests.parity.workers",
        "twotower.data.prepare",
        "twotower.lifecycle.forget",
        "twotower.generations.bucket",
        "twotower.lifecycle.update",
    ]
)


class Apart:
    """A program that runs like ``python -c``; used as a subprocess.Popen of text is."""

    returncode: int | None = None

    def __init__(self, code: str, *arguments: object, **environment: str) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._printed = [self._folder / name for name in ("stdout", "stderr")]
        for path in self._printed:
            path.touch()
        variables = {**os.environ, **environment}
        words = [str(argument) for argument in arguments]
        self._process = context.Process(target=_run, args=(code, words, variables, *self._printed))
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end and return what was printed on stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it did not end, and was killed.
        """
        self._process.join(timeout)
        in_time = self._process.exitcode is not None
        if not in_time:
            self._process.kill()
            self._process.join()
        self.poll()
        self._process.close()
        out, err = (path.read_text() for path in self._printed)
        shutil.rmtree(self._folder)
        if not in_time:
            raise subprocess.TimeoutExpired("python", timeout, out, err)
        return out, err


def run_apart(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    process = Apart(code, *arguments, **environment)
    out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess([code, *map(str, arguments)], process.returncode, out, err)


def _run(code: str, arguments: list[str], environment: dict[str, str], *printed: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    # As in a new process: the fork server leaves Ctrl-C to its parent.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["-c", *arguments]
    program: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<string>", "exec"), program)

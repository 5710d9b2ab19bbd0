"""Ray's C++ lines on the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_native_log() -> Iterator[None]:
    """Keep lines that C++ code of this process writes to stderr off the screen; Python's stderr goes on.

    Ray's core reports an error for every actor of Ray Data that may restart, and no setting silences that
    without printing a line of its own. Ray's log files have all lines.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    before = sys.stderr
    try:
        direct = before.fileno() == 2
    except (OSError, ValueError):
        direct = False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    if direct:
        sys.stderr = os.fdopen(os.dup(screen), "w", encoding=before.encoding, errors="replace", buffering=1)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        if direct:
            sys.stderr.close()
            sys.stderr = before

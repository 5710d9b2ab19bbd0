"""Where a job's result goes: stdout and the file of ``--result``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from twotower.artefacts import write_bytes
from twotower.errors import ConfigError, SystemFaultError
from twotower.progress import vanish


def check(path: Path | None) -> None:
    """Check that a result can be written, before the hours that it may take; makes the folder.

    Raises:
        ConfigError: the path is a folder, or no file can be made there.
    """
    if path is None or _is_stream(path):
        return
    if path.is_dir():
        raise ConfigError(f"--result {path} is a folder; give the path of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"--result {path} can not be written ({reason}); choose another path") from error


def report(lines: Sequence[str], value: str, path: Path | None) -> None:
    """Write the result to its file, and the lines to stdout.

    Args:
        lines: for stdout; nobody has to read them.
        value: the result as JSON.
        path: the file.

    Raises:
        SystemFaultError: stdout took no more.
    """
    data = f"{value}\n".encode()
    if path is not None and _is_stream(path):
        path.write_bytes(data)
    elif path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read it has gone, such as `head`. The work is done all the same.
        vanish(sys.stdout)
    except OSError as error:
        vanish(sys.stdout)
        reason = error.strerror or error
        raise SystemFaultError(f"stdout took no result ({reason}), which is {value}") from error


def _is_stream(path: Path) -> bool:
    """Return whether a path leads to a pipe or a device, or to a file by a link: nothing to put a file at."""
    return path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir())

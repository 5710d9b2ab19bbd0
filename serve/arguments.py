"""The arguments of the Serve application."""

from pathlib import Path
from typing import Self

from pydantic import ConfigDict

from twotower.config import ApplicationConfig


class BuildArgs(ApplicationConfig):
    """Arguments of the application, from a command line or from ``serve/config.yaml``."""

    # A command line gives text.
    model_config = ConfigDict(strict=False)

    store: str
    """Path of the store, the same on every node, or its URL; its pointer names what is served."""
    cache: str | None = None
    """Folder of each node for the generations of a URL."""
    pointer: str = "CURRENT"
    """Pointer of the store to serve."""

    def resolved(self) -> Self:
        """Return the same with absolute paths, since a replica may run in another folder."""
        return self.model_copy(
            update={
                "store": self.store if "://" in self.store else _absolute(self.store),
                "cache": None if self.cache is None else _absolute(self.cache),
                "token_file": None if self.token_file is None else _absolute(self.token_file),
            }
        )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())

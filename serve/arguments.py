"""The arguments of the Serve application."""

from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from twotower.config import ApplicationConfig
from twotower.config.problems import problems
from twotower.errors import ConfigError


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

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            lines = problems(error.errors(), cls)
            raise ConfigError(f"the arguments of the application are not valid: {'; '.join(lines)}") from None

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

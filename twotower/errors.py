"""The errors a person is meant to read: each says which value, which rule and what to do."""

import errno
import math
import os
import re
from typing import Any

import orjson

from twotower.redaction import redacted

_LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""What the system says of a file that is not there, however often it is asked."""
_MAX_SHOWN = 60
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}
_REFUSAL = re.compile(
    r"(?:(?:(?:could not|unable to) .*|with strerror): ([^:()]+?)(?: \(\d+\))?"
    r"|write error in .* \(([^()]+)\))\s*$",
    re.MULTILINE,
)


class TwotowerError(Exception):
    """Base of every error that a person can act on; jobs print its message without a stack trace.

    Passwords and tokens in its message are hidden, wherever it is printed, logged or answered.

    Example:
        >>> try:
        ...     tt.configure({"train.epoch": 5})
        ... except tt.TwotowerError as error:
        ...     print(error)
        the configuration is not valid: ...epochs...
    """

    exit_code = 2

    def __init__(self, *args: object) -> None:
        """Take the message."""
        super().__init__(*(redacted(a) if isinstance(a, str) else a for a in args))


class ConfigError(TwotowerError):
    """A configuration value, or a combination of values, is not allowed."""


class DataError(TwotowerError):
    """Input data is missing, unreadable, or breaks a rule of the dataset."""


class DownloadError(DataError):
    """A data set could not be fetched, or what was fetched is damaged."""


class ArtefactError(TwotowerError):
    """A dataset, checkpoint or generation is missing, incomplete, damaged or of another format."""


class DamagedError(ArtefactError):
    """A file is missing or is not the one that its manifest names."""


class UnavailableError(ArtefactError):
    """A store can not give something now: it does not answer, or an object has to be published again."""


class ArtefactMismatchError(ArtefactError):
    """Two artefacts that do not belong together were combined; both fingerprints are named."""


class RequestError(TwotowerError):
    """A retrieval request asks for something that is not allowed (HTTP 4xx)."""


class NotAllowedError(RequestError):
    """A value of a query that is not allowed, and what is."""

    def __init__(self, message: str, allowed: str) -> None:
        """Keep both parts apart, for an answer that shows them apart."""
        super().__init__(f"{message}; allowed: {allowed}")
        self.message = message
        self.allowed = allowed


class TrainingError(TwotowerError):
    """Training can not start or go on."""


class SystemFaultError(TwotowerError):
    """The machine, a disk, the network or Ray refused something; the same job may succeed later."""

    exit_code = 1


class RefusedError(TwotowerError):
    """A gate refused to publish."""

    exit_code = 3


class OvertakenError(RefusedError):
    """Another publisher was faster."""

    def __init__(self, message: str, remedy: str) -> None:
        """Keep both apart: whoever made the generation on the way knows better what to do."""
        super().__init__(f"{message}. {remedy}")
        self.message = message


class StoppedError(TwotowerError):
    """The job was asked to stop by SIGTERM, and has left a state to go on from."""

    exit_code = 143


def shown(value: Any) -> str:
    """Return a value of a query as messages show it, shortened: a text in quotes, all else as JSON has it."""
    text = repr(value) if isinstance(value, str) else as_json(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def as_json(value: Any) -> str:
    """Return a value as JSON has it, or of what type it is where JSON has nothing for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return orjson.dumps(value, default=str).decode()
    except orjson.JSONEncodeError:
        # Nested deeper than can be written, or an integer of more than 64 bits.
        return f"a value of type {type(value).__name__}"


def may_pass(error: BaseException) -> bool:
    """Return whether the same attempt may succeed later.

    It may not where something was read and found wrong. It may where the system could not read what is there
    (a disk, a network, the number of open files), and after anything that nobody foresaw.
    """
    if not isinstance(error, TwotowerError) or isinstance(error, (UnavailableError, SystemFaultError)):
        return True
    # ``raise ... from None`` hides the context from people, and keeps it. Arrow's own errors have no number.
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno is not None and cause.errno not in _LASTING


def system_error(error: Exception) -> OSError | None:
    """Return what the system refused, where a C++ library put that into its text; None where it did not.

    FAISS and torch say so of opening, mapping and writing a file. What FAISS says of reading one ends with
    words of the system too, but they may be of an earlier call.
    """
    found = _REFUSAL.search(str(error))
    number = None if found is None else _NUMBERS.get(found[1] or found[2])
    return None if number is None else OSError(number, os.strerror(number))

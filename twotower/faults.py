"""What the system, a disk, the memory, the network or Ray refused, in one line for a person.

The one place where that is put into words: jobs, tasks and actors pass what they catch to :func:`explain`.
Ray's wrappers are known by their attributes, so that this needs no Ray.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator

from twotower.errors import ConfigError, SystemFaultError, TwotowerError, system_error

_CODE = re.compile(r"(?:os error |\[errno )(\d+)[)\]]", re.IGNORECASE)
"""How libraries in Rust and Arrow write the number of what the system refused."""
_NO_MEMORY = re.compile(r"bad_alloc|(?:can't|cannot|failed to) allocate memory|out of memory", re.IGNORECASE)
_UNWRITTEN = re.compile(r"PytorchStreamWriter|inline_container.*unexpected pos", re.DOTALL)
"""What torch says of a file that it could not write, whatever the reason was."""
_MEMORY_ADVICE = "run it again with less beside it, or on a larger machine"
_FREE = "free some there, or choose another folder (storage.root), and run it again"
_ADVICE = {
    errno.ENOSPC: f"no space is left on the disk; {_FREE}",
    errno.EDQUOT: f"the quota of disk space is used up; {_FREE}",
    errno.EFBIG: "the file is larger than this process or disk allows; raise the limit (ulimit -f), or "
    "choose another folder (storage.root)",
    errno.EMFILE: "too many files are open; raise the limit of this process (ulimit -n) and run it again",
    errno.ENFILE: "too many files are open on this machine; end other programs and run it again",
    errno.EIO: "the disk could not do it (Input/output error); look at the disk, and run it again",
    errno.ESTALE: "the network folder was lost (Stale file handle); mount it again, and run it again",
    errno.EAGAIN: "no process or thread can be started now; raise the limit (ulimit -u), and run it again",
}
"""What may pass: free space, limits, disks."""
_LASTING = {
    errno.EROFS: "it is on a file system that can only be read; choose another folder",
    errno.EACCES: "permission is denied; allow it to this user, or choose another path",
    errno.EPERM: "permission is denied; allow it to this user, or choose another path",
    errno.ENOENT: "there is no such file or folder; check the path, or run the job that makes it",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "it is a folder, not a file; choose another path",
    errno.EEXIST: "there is something else of that name; remove it, or choose another path",
    errno.ENOTEMPTY: "the folder is not empty; remove what is in it, or choose another path",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.ELOOP: "the path goes round in circles of links; choose another path",
    errno.EXDEV: "it lies on another file system; choose a path on the same one",
}
"""What stays until somebody changes it."""
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_RAY = {
    "OutOfDiskError": f"no space is left for what Ray keeps on disk; {_FREE}, or name another for RAY_TMPDIR",
    "ObjectStoreFullError": "Ray's object store is full; run it again with less beside it",
    "OutOfMemoryError": f"out of memory: Ray ended a process because the machine was full; {_MEMORY_ADVICE}",
    "RuntimeEnvSetupError": "Ray could not prepare the environment of its processes; look at its logs",
    "AuthenticationError": "Ray refused the token; set RAY_AUTH_MODE and RAY_AUTH_TOKEN as on the cluster",
}
_RAY_DEATHS = {"RayActorError", "WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError"}
_RAY_SILENCES = {"RaySystemError", "GetTimeoutError", "ActorUnavailableError", "ObjectLostError"}
_RAY_DIED = (
    "a process of Ray died; run it again to go on. Where that happens again, the machine may be out of memory"
)


def explain(error: BaseException) -> TwotowerError | None:
    """Return an exception as the error that a person can act on; None where it is a defect.

    What is wrapped by Ray, or is the cause of another exception, is found. A TwotowerError is returned as it
    is. What may pass is a SystemFaultError, what somebody has to change first a ConfigError.
    """
    found = list(_causes(error))
    for cause in found:
        if isinstance(cause, TwotowerError):
            return cause
    for cause in found:
        told = _told(cause)
        if told is not None:
            return told
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it carries or was raised from, without Ray's wrappers."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        cause = pending.pop(0)
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        # Ray's errors of tasks are also of the class that was raised, but with a remote trace as message.
        inner = getattr(cause, "cause", None)
        failures = getattr(cause, "worker_failures", None)
        carried = list(failures.values()) if isinstance(failures, dict) else []
        carried += [e for e in (inner, cause.__cause__) if e is not None]
        pending += [e for e in carried if isinstance(e, BaseException)]
        if not isinstance(inner, BaseException):
            yield cause


def _told(error: BaseException) -> TwotowerError | None:
    text = _first_line(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return SystemFaultError(f"out of memory{': ' if text else ''}{text}; {_MEMORY_ADVICE}")
    if isinstance(error, OSError):
        return _of_system(error)
    if type(error).__module__.startswith("ray."):
        return _of_ray(error)
    if isinstance(error, Exception):
        if _UNWRITTEN.search(str(error)):
            return SystemFaultError(f"a file could not be written, most likely for want of space; {_FREE}")
        number = _CODE.search(str(error))
        refused = system_error(error) if number is None else OSError(int(number[1]), text)
        return None if refused is None else _of_system(refused, text)
    return None


def _of_system(error: OSError, text: str | None = None) -> TwotowerError:
    if error.errno == errno.ENOMEM:
        return SystemFaultError(f"out of memory: {text or _first_line(error)}; {_MEMORY_ADVICE}")
    if isinstance(error, _NETWORK) and error.filename is None:
        reason = _first_line(error) or type(error).__name__
        return SystemFaultError(f"a connection failed ({reason}); check the network, and run it again")
    place = _place(error)
    # Arrow names the file in its words alone.
    start = place or text or ("" if error.errno is None else _words(error))
    start += ": " if start else ""
    if error.errno in _LASTING:
        return ConfigError(f"{start}{_LASTING[error.errno]}")
    if error.errno in _ADVICE:
        return SystemFaultError(f"{start}{_ADVICE[error.errno]}")
    reason = (error.strerror if place else None) or _first_line(error)
    return SystemFaultError(f"{place}{': ' if place else ''}{reason}; run it again, with --debug for more")


def _place(error: OSError) -> str:
    """Return the path that an error of the system names, or both; empty where it names none."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return " to ".join(name.decode(errors="replace") if isinstance(name, bytes) else name for name in names)


def _words(error: OSError) -> str:
    """Return what an error of the system says beyond the name of its number."""
    words = " ".join(str(error.strerror or "").split())
    return "" if error.errno is None or words == os.strerror(error.errno) else words


def _of_ray(error: BaseException) -> TwotowerError | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    for name, words in _RAY.items():
        if name in names:
            return SystemFaultError(words)
    if names & {
        "RayActorError",
        "WorkerCrashedError",
        "NodeDiedError",
        "LocalRayletDiedError",
        "ActorDiedError",
    }:
        return SystemFaultError(_RAY_DIED)
    if names & {"RaySystemError", "GetTimeoutError", "ActorUnavailableError", "ObjectLostError"}:
        return SystemFaultError(
            f"Ray did not answer as it should ({_first_line(error)}); run it again to go on"
        )
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""

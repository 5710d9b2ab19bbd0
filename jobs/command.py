"""The command line that all jobs share: configuration in, one library call, one JSON line out.

A job's module holds ``work(config, arguments) -> Result`` and calls :func:`run`. Progress goes to stderr. The
last line on stdout is ``TWOTOWER_RESULT`` and one JSON object. Exit codes: 0 done, 1 out of memory or a
defect, 2 bad configuration or input, 3 refused by a gate, 143 stopped by SIGTERM. A job imports Ray and the
``twotower.cluster`` modules inside ``work``, since Ray reads its environment when it is imported and that is
set here first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jobs.reference import config_reference
from twotower.artefacts import write_bytes
from twotower.config import Config, load_config
from twotower.environment import apply_environment
from twotower.errors import ConfigError, TwotowerError

RESULT_PREFIX = "TWOTOWER_RESULT"
EXIT_FAILED = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Result:
    """What a job reports: the path it made, metrics such as ``recall@100``, and other facts."""

    path: Path | str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[str] = ()
    """Lines for people, printed on stdout before the result line."""

    def to_json(self, job: str) -> dict[str, Any]:
        """Return the object of the result line."""
        value: dict[str, Any] = {"job": job}
        if self.path is not None:
            value["path"] = str(self.path)
        if self.metrics:
            value["metrics"] = dict(self.metrics)
        return {**value, **self.details}


_stopped = threading.Event()
"""Whether this job was asked to stop."""

Work = Callable[[Config, argparse.Namespace], Result]
Arguments = Callable[[argparse.ArgumentParser], None]


def run(
    job: str,
    description: str | None,
    work: Work,
    arguments: Arguments | None = None,
    argv: Sequence[str] | None = None,
    default_config: str | None = None,
) -> int:
    """Run a job and return its exit code.

    Args:
        job: name of the module below ``jobs``.
        description: help text, the module's docstring.
        work: does the job.
        arguments: adds the job's own arguments to the parser.
        argv: the command line without the program; that of the process when not given.
        default_config: the file read without ``--config``; built-in defaults when not given.
    """
    options = _parser(job, description, arguments, default_config).parse_intermixed_args(argv)
    apply_environment()
    _stopped.clear()
    stop_on_sigterm()
    try:
        config = load_config(options.config, [item for group in options.set for item in group])
        check_storage(config)
        # Only the result belongs on stdout, whatever a library prints.
        with contextlib.redirect_stdout(sys.stderr):
            result = work(config, options)
        _report(job, result, options.result)
    except TwotowerError as error:
        print(f"\njobs.{job}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except MemoryError as error:
        advice = "run it again with less beside it, or on a larger machine"
        print(f"\njobs.{job}: out of memory: {error}; {advice}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"\njobs.{job}: interrupted; run it again to go on", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        # Inside a call of Ray the code becomes 1, and Ray's own handler exits with the signal's number.
        if not _stopped.is_set() and stop.code not in (signal.SIGTERM, EXIT_TERMINATED):
            raise
        print(f"\njobs.{job}: stopped by SIGTERM; run it again to go on", file=sys.stderr, flush=True)
        return EXIT_TERMINATED
    return 0


def check_storage(config: Config, environment: Mapping[str, str] | None = None) -> None:
    """Check that every process of the job means the same folder by ``storage.root``.

    Raises:
        ConfigError: the root is a URL; or it is relative and the job was submitted to a cluster (it runs in a
            copy of the working directory that is thrown away) or the cluster is on another machine.
    """
    environment = os.environ if environment is None else environment
    root = config.storage.root
    if "://" in root:
        raise ConfigError(
            f"storage.root ({root}) is a URL; artefacts live in a folder that every node sees: give its "
            "path. Generations alone may live in a bucket, which storage.store names"
        )
    if Path(root).expanduser().is_absolute():
        return
    remedy = f"give an absolute folder that every node sees, such as --set storage.root=/shared/{root}"
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment:
        raise ConfigError(
            f"storage.root ({root}) is relative, and a submitted job runs in a temporary copy of the working "
            f"directory, where its results would be lost; {remedy}"
        )
    address = environment.get("RAY_ADDRESS", "")
    if not _is_here(address):
        raise ConfigError(
            f"storage.root ({root}) is relative, and the cluster is on another machine "
            f"(RAY_ADDRESS={address}); {remedy}"
        )


def _is_here(address: str) -> bool:
    """Return whether RAY_ADDRESS names no other machine. Nothing is sent to it."""
    if address in ("", "auto", "local"):
        return True
    host = address.split("://")[-1].split("/")[0].rpartition(":")[0].strip("[]") or address
    try:
        family, kind, protocol, _, resolved = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        # Only an address of this machine can be bound.
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(resolved)
    except OSError:
        return False
    return True


def _parser(
    job: str, description: str | None, arguments: Arguments | None, default_config: str | None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{job}",
        description=(description or "").strip(),
        epilog=config_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=default_config,
        help=f"YAML file ({default_config or 'built-in values'} when not given)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="append",
        default=[],
        help="values that replace those of the file, such as train.epochs=5 train.loss.temperature=0.1",
    )
    parser.add_argument("--result", metavar="FILE", type=Path, help="write the result as JSON here too")
    if arguments is not None:
        arguments(parser)
    return parser


def _report(job: str, result: Result, path: Path | None) -> None:
    value = json.dumps(result.to_json(job), ensure_ascii=False, allow_nan=False)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, f"{value}\n".encode())
    for line in result.lines:
        print(line)
    print(f"{RESULT_PREFIX} {value}", flush=True)


def stop_on_sigterm() -> None:
    """Let SIGTERM end the job with its clean-up; call it again after Ray has started.

    Ray's core puts a handler of its own below Python's, which aborts the process.
    """
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    _stopped.set()
    raise SystemExit(EXIT_TERMINATED)

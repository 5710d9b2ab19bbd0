"""The command line that all jobs share: configuration in, one library call, one JSON line out.

A job's module holds ``work(config, arguments) -> Result`` and calls :func:`run`. Progress goes to stderr. The
last line on stdout is ``TWOTOWER_RESULT`` and one JSON object. Exit codes: 0 done, 1 the machine, a disk, the
network or Ray refused something (or a defect, with its stack trace), 2 bad configuration or input, 3 refused
by a gate, 130 interrupted by Ctrl-C, 143 stopped by SIGTERM, 129 by SIGHUP. A job imports Ray and the
``twotower.cluster`` modules inside ``work``, since Ray reads its environment when it is imported and that is
set here first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jobs import output
from jobs.reference import config_reference
from twotower.config import Config, load_config
from twotower.environment import apply_environment
from twotower.environment import check_storage as check_storage
from twotower.faults import explain
from twotower.progress import note

RESULT_PREFIX = "TWOTOWER_RESULT"
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


_stopped: list[int] = []
"""The signals that asked this job to stop."""

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
        output.check(options.result)
        config = load_config(options.config, [item for group in options.set for item in group])
        check_storage(config)
        # Only the result belongs on stdout, whatever a library prints.
        with contextlib.redirect_stdout(sys.stderr):
            result = work(config, options)
        value = json.dumps(result.to_json(job), ensure_ascii=False, allow_nan=False)
        output.report([*result.lines, f"{RESULT_PREFIX} {value}"], value, options.result)
    except KeyboardInterrupt:
        return _ended(job, "interrupted; run it again to go on", EXIT_INTERRUPTED)
    except SystemExit as stop:
        # Inside a call of Ray the code becomes 1, and Ray's own handler exits with the signal's number.
        number = _stopped[-1] if _stopped else signal.SIGTERM
        if not _stopped and stop.code not in (signal.SIGTERM, EXIT_TERMINATED):
            raise
        return _ended(job, f"stopped by {signal.Signals(number).name}; run it again to go on", 128 + number)
    except Exception as error:
        return failed(job, error, options.debug)
    return 0


def failed(job: str, error: Exception, debug: bool) -> int:
    """Say what ended a job, and return its exit code.

    Args:
        job: name of the module below ``jobs``.
        error: what was raised. A defect is raised again: its stack trace is what a report of it needs.
        debug: show the stack trace of any other error too.
    """
    told = explain(error)
    if told is None:
        raise error
    if debug:
        note("".join(traceback.format_exception(error)))
    return _ended(job, str(told), told.exit_code)


def _ended(job: str, message: str, code: int) -> int:
    note(f"\njobs.{job}: {message}\n")
    return code


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
        help="values that replace those of the file, such as train.epochs=5 train.loss.temperature=0.1; a "
        "text is taken as it is, a list is [64, 32], no value is null; of two for one key the later counts",
    )
    parser.add_argument("--result", metavar="FILE", type=Path, help="write the result as JSON here too")
    parser.add_argument("--debug", action="store_true", help="show the stack trace of whatever ends the job")
    if arguments is not None:
        arguments(parser)
    return parser


def stop_on_sigterm() -> None:
    """Let SIGTERM end the job with its clean-up, and SIGHUP too; call it again after Ray has started.

    Ray's core puts a handler of its own below Python's, which aborts the process.
    """
    signal.signal(signal.SIGTERM, _terminate)
    # Whoever uses nohup wants the job to outlive the terminal.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    _stopped.append(signum)
    raise SystemExit(128 + signum)

"""The command line that all jobs share: configuration in, one library call, one JSON line out.

A job's module holds ``work(config, arguments) -> Result`` and a :class:`Job` that names it; ``python -m
jobs.NAME`` and the command ``twotower`` both call :meth:`Job.run`. Progress goes to stderr. The last line on
stdout is ``TWOTOWER_RESULT`` and one JSON object; with ``--json`` that object is all of stdout. Exit codes: 0
done, 1 the machine, a disk, the network or Ray refused something (or a defect, with its stack trace), 2 bad
configuration or input, 3 refused by a gate, 130 interrupted by Ctrl-C, 143 stopped by SIGTERM, 129 by SIGHUP.
A job imports Ray and the ``twotower.cluster`` modules inside ``work``, since Ray reads its environment when
it is imported and that is set here first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from jobs import output
from jobs.reference import config_reference
from twotower import progress
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
    exit_code: int = 0
    """The exit code of a job that did its work, and found something that its caller has to know."""
    remark: str | None = None
    """What that is, for stderr."""

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


@dataclass(frozen=True)
class Job:
    """One command: what it is called, what it takes, what it does."""

    name: str
    """Name of the module below ``jobs``."""
    description: str | None
    """Help text: the module's docstring."""
    work: Work
    """Does the job."""
    arguments: Arguments | None = None
    """Adds the job's own arguments to the parser."""
    default_config: str | None = None
    """The file read without ``--config``; built-in defaults when not given."""
    reads_config: bool = True
    """Whether it takes ``--config`` and ``--set``; ``work`` gets the built-in defaults otherwise."""
    local: bool = False
    """Whether it only looks around on this machine: any storage root is taken, and the result line is left
    out, which is for ``ray job submit``."""

    def run(self, argv: Sequence[str] | None = None, program: str | None = None) -> int:
        """Run the job and return its exit code.

        Args:
            argv: the command line without the program; that of the process when not given.
            program: how the job was called, for messages; ``python -m jobs.NAME`` when not given.
        """
        label = program or f"jobs.{self.name}"
        options = self.parser(program).parse_intermixed_args(argv)
        apply_environment()
        _stopped.clear()
        stop_on_sigterm()
        try:
            with progress.quieted(options.quiet):
                result = self._result(options)
        except KeyboardInterrupt:
            return _ended(label, "interrupted; run it again to go on", EXIT_INTERRUPTED)
        except SystemExit as stop:
            # Inside a call of Ray the code becomes 1, and Ray's own handler exits with the signal's number.
            number = _stopped[-1] if _stopped else signal.SIGTERM
            if not _stopped and stop.code not in (signal.SIGTERM, EXIT_TERMINATED):
                raise
            return _ended(
                label, f"stopped by {signal.Signals(number).name}; run it again to go on", 128 + number
            )
        except Exception as error:
            return failed(label, error, options.debug)
        if result.remark is not None:
            return _ended(label, result.remark, result.exit_code)
        return result.exit_code

    def parser(self, program: str | None = None) -> argparse.ArgumentParser:
        """Return the parser of the job's command line."""
        parser = argparse.ArgumentParser(
            prog=program or f"python -m jobs.{self.name}",
            description=_spoken(self.description, program),
            epilog=config_reference() if self.reads_config else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if self.reads_config:
            add_config(parser, self.default_config)
        parser.add_argument("--result", metavar="FILE", type=Path, help="write the result as JSON here too")
        add_common(parser)
        if self.arguments is not None:
            self.arguments(parser)
        return parser

    def _result(self, options: argparse.Namespace) -> Result:
        output.check(options.result)
        config = Config()
        if self.reads_config:
            config = load_config(options.config, [item for group in options.set for item in group])
        if not self.local:
            check_storage(config)
        # Only the result belongs on stdout, whatever a library prints.
        with _library_output(options.quiet) as elsewhere, contextlib.redirect_stdout(elsewhere):
            result = self.work(config, options)
        value = json.dumps(result.to_json(self.name), ensure_ascii=False, allow_nan=False)
        lines = [value] if options.json else list(result.lines)
        if not (self.local or options.json):
            lines.append(f"{RESULT_PREFIX} {value}")
        output.report(lines, value, options.result)
        return result


def run(
    job: str,
    description: str | None,
    work: Work,
    arguments: Arguments | None = None,
    argv: Sequence[str] | None = None,
    default_config: str | None = None,
) -> int:
    """Run a job that no module declares, and return its exit code; see :class:`Job`."""
    return Job(job, description, work, arguments, default_config).run(argv)


def _spoken(description: str | None, program: str | None) -> str:
    """Return help text whose examples call the job as it was called."""
    text = (description or "").strip()
    if program is None:
        return text
    return re.sub(r"python -m jobs\.(\w+)", lambda found: f"twotower {found[1].replace('_', '-')}", text)


def _library_output(quiet: bool) -> contextlib.AbstractContextManager[TextIO]:
    """Return where goes what libraries print: stderr, or nowhere."""
    return open(os.devnull, "w") if quiet else contextlib.nullcontext(sys.stderr)


def failed(label: str, error: Exception, debug: bool) -> int:
    """Say what ended a job, and return its exit code.

    Args:
        label: how the job was called.
        error: what was raised. A defect is raised again: its stack trace is what a report of it needs.
        debug: show the stack trace of any other error too.
    """
    told = explain(error)
    if told is None:
        raise error
    if debug:
        note("".join(traceback.format_exception(error)))
    return _ended(label, str(told), told.exit_code)


def _ended(label: str, message: str, code: int) -> int:
    note(f"\n{label}: {message}\n")
    return code


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--config`` and ``--set``.

    Args:
        parser: of a job.
        default: the file read without ``--config``.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=default,
        help=f"YAML file ({default or 'built-in values'} when not given)",
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


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes: ``--quiet``, ``--json`` and ``--debug``."""
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr; errors are still said")
    parser.add_argument("--json", action="store_true", help="only the result on stdout, as one line of JSON")
    parser.add_argument("--debug", action="store_true", help="show the stack trace of whatever ends the job")


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

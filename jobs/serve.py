"""Serve the published generation of a configuration on this machine, and leave nothing behind.

    python -m jobs.serve --config configs/movielens.yaml [--set serve.port=8001]

This is ``make serve``. It joins a running Ray cluster or starts Ray, runs ``serve.app:build`` behind
HAProxy, waits for Ctrl-C or SIGTERM, and then stops everything that it started.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import urllib.request
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn, Self

from jobs import command
from serve.running import running
from twotower import progress
from twotower.config import load_config

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Stop(BaseException):
    """A signal asked for the end."""


class _Signals:
    """Ends the block with its clean-up at the first SIGINT, SIGTERM or SIGHUP.

    Later signals change nothing: a clean-up that is interrupted would leave processes behind.
    """

    def __init__(self) -> None:
        self._stopping = False

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        self.catch()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # While Ray starts its own handler is in place, which raises SystemExit.
        return kind is not None and issubclass(kind, (_Stop, SystemExit))

    def catch(self) -> None:
        """Install the handlers; Ray replaces them when it starts."""
        for number in _STOP_SIGNALS:
            signal.signal(number, self._stop)

    def wait(self) -> NoReturn:
        """Sleep until a signal ends the block."""
        while True:
            signal.pause()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._stopping:
            self._stopping = True
            raise _Stop


def parser(program: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog=program or "python -m jobs.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_config(found)
    found.add_argument("--pointer", default="CURRENT", help="pointer of the store to serve")
    command.add_common(found)
    return found


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parser(program).parse_args(argv)
    try:
        with progress.quieted(options.quiet):
            _serve(options)
    except Exception as error:
        return command.failed(program or "jobs.serve", error, options.debug)
    return 0


def _serve(options: argparse.Namespace) -> None:
    config = load_config(options.config, [item for group in options.set for item in group])
    with _Signals() as signals:
        progress.stage(f"serve {config.name}")
        with running(config, options.pointer, connected=signals.catch) as url:
            if options.json:
                # There is no result at the end: what a script waits for is where to ask.
                print(json.dumps({"job": "serve", "url": url, "pointer": options.pointer}), flush=True)
            _announce(url, config.serve.demo)
            signals.wait()
    progress.say("stopped")


def _announce(url: str, demo: bool) -> None:
    body = json.dumps({"user_id": "1", "k": 5})
    progress.say(f"ready: {url} (try {url}/docs)")
    if demo:
        progress.say(f"demo page, with users' histories: {url}/ (--set serve.demo=false leaves it out)")
    progress.say(f"curl -s {url}/v1/retrieve -H 'Content-Type: application/json' -d '{body}'")
    with urllib.request.urlopen(f"{url}/readyz") as answer:
        missing = json.load(answer)["settings"]["missing"]
    if missing:
        progress.say(
            f"warning: slower than it could be: Ray was started without {', '.join(sorted(missing))}; source "
            "deploy/ray.env before `ray start`"
        )
    progress.say("Ctrl-C stops it")


if __name__ == "__main__":
    sys.exit(main())

"""The command ``twotower``: every job as a sub-command, and help that needs nothing but Python.

``twotower NAME ...`` and ``python -m jobs.NAME ...`` take the same arguments and run the same code. A module
is imported when its command is called, so that help, the version and a typing error are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

import twotower

COMMANDS = {
    "init": ("jobs.init.__main__", "write a configuration for your own files, with a reason for each guess"),
    "doctor": ("jobs.doctor.__main__", "check this machine, its packages and its settings"),
    "quickstart": ("jobs.quickstart", "MovieLens in, recommendations out over HTTP, on this machine"),
    "pipeline": ("jobs.pipeline", "prepare, train, build the index, evaluate and publish"),
    "prepare": ("jobs.prepare", "read raw data and write the prepared dataset"),
    "train": ("jobs.train", "train the two towers"),
    "build-index": ("jobs.build_index", "encode the catalogue, build the index and publish it"),
    "evaluate": ("jobs.evaluate", "measure the model beside baselines and write the report"),
    "recommend": ("jobs.recommend", "write the top k items of every user or query to Parquet"),
    "serve": ("jobs.serve", "answer over HTTP from the published generation"),
    "tune": ("jobs.tune", "train with different settings side by side"),
    "update-items": ("jobs.update_items", "add, change and delete items of the published generation"),
    "forget": ("jobs.forget", "remove users from every artefact"),
    "generations": ("jobs.generations", "list, inspect, verify, publish, roll back and prune generations"),
    "completion": ("jobs.completion", "print a script that completes commands and options in a shell"),
}
"""By command: its module, which has ``main`` and ``parser``, and one line about it."""
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0].replace("_", "-") if arguments else ""
    if name not in COMMANDS:
        return _without_command(arguments)
    try:
        module = importlib.import_module(COMMANDS[name][0])
        code: int = module.main(arguments[1:], program=f"twotower {name}")
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    return code


def _without_command(arguments: list[str]) -> int:
    parser = _parser()
    if not arguments:
        parser.print_help()
        return _EXIT_USAGE
    parser.parse_known_args(arguments[:1] if arguments[0].startswith("-") else [])
    near = difflib.get_close_matches(arguments[0], COMMANDS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    print(
        f"twotower: {arguments[0]!r} is no command; {hint}twotower --help lists them",
        file=sys.stderr,
    )
    return _EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="twotower",
        usage="twotower [--help] [--version] COMMAND [ARGUMENTS]",
        description="Two-tower retrieval on Ray: interactions in, recommendations out.",
        epilog="\n".join(
            [
                "commands:",
                *(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()),
                "",
                "`twotower COMMAND --help` shows its options and every key of the configuration.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"twotower {twotower.__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())

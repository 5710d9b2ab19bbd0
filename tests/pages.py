"""The pages of the documentation: their blocks with the marks of CONTRIBUTING.md, and how a block is run.

A block of a shell is run by bash in a folder, with ``set -eu``. What it calls as ``python -m jobs.NAME``,
``python -m benchmarks.load`` or ``twotower`` runs in this process: a program of that name in the folder sends
its arguments here and prints what comes back. So a page's pipes, variables and redirections are bash's own,
and no block waits for imports.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import cli
from twotower.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
MARKED = {"bash", "sh", "console", "python", "yaml"}
"""Languages of blocks that somebody may copy; each of these needs a mark."""
_MARK = re.compile(r"<!-- (run|check|skip)(?:: (.+))? -->")
_TIMEOUT_S = 240.0
_SHIM = """#!/bin/bash
case "$(basename "$0") ${1:-} ${2:-}" in
  "python -m jobs."*|"python -m benchmarks.load"|"twotower "*) ;;
  *) exec "$REAL_PYTHON" "$@";;
esac
reply=$(mktemp -u "$SHIMS/reply.XXXXXX")
printf '%s\\0' "$PWD" "$(basename "$0")" "$@" > "$reply.arguments"
mkfifo "$reply"
echo "$reply" > "$SHIMS/calls"
{ read -r code; cat; } < "$reply"
exit "$code"
"""
_MAKE = f'#!/bin/bash\nexec /usr/bin/make --silent --dry-run -C "{ROOT}" "$@" > /dev/null\n'
_RAY = '#!/bin/bash\nwhile [ $# -gt 0 ] && [ "$1" != -- ]; do shift; done\nshift || exit 0\nexec "$@"\n'
"""Ray's own commands start nothing; the command of a submitted job is called."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    """Path of the page from the root."""
    line: int
    language: str
    action: str
    """run, check, skip; empty where there is no mark."""
    detail: str
    """What stands behind the action."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a text in Markdown."""
    lines = text.splitlines()
    place = 0
    while place < len(lines):
        fence = re.match(r"\s*```(\w*)\s*$", lines[place])
        if fence is None:
            place += 1
            continue
        mark = _MARK.fullmatch(lines[place - 1].strip()) if place else None
        end = next(i for i in range(place + 1, len(lines)) if lines[i].strip() == "```")
        yield Block(
            page,
            place + 1,
            fence[1],
            mark[1] if mark else "",
            (mark[2] or "") if mark else "",
            "\n".join(lines[place + 1 : end]) + "\n",
        )
        place = end + 1


def blocks(action: str = "", detail: str | None = None) -> list[Block]:
    """Return the blocks of all pages, of one action and one detail where these are given."""
    found = [b for path in PAGES for b in blocks_of(path.read_text(), str(path.relative_to(ROOT)))]
    return [b for b in found if action in ("", b.action) and detail in (None, b.detail)]


def the_block(page: str, detail: str) -> Block:
    """Return the one block of a page that is run by the test of this name."""
    [block] = [b for b in blocks("run", detail) if b.page == page]
    return block


def commands_of(console: str) -> tuple[str, str]:
    """Return the commands of a console's text, and what they printed."""
    lines = console.splitlines(keepends=True)
    commands = "".join(line.removeprefix("$ ") for line in lines if line.startswith("$ "))
    return commands, "".join(line for line in lines if not line.startswith("$ "))


def run_in_process(arguments: list[str]) -> int:
    """Run a job, the command or the load test, as its command line says."""
    program, *rest = arguments
    if program == "twotower":
        return cli.main(rest)
    module, *rest = rest[1:]
    main = importlib.import_module(module).main
    code = main(rest)
    return int(code or 0)


def check_in_process(arguments: list[str]) -> int:
    """Have a job or a benchmark read its command line and configuration, and do nothing."""
    program, *rest = arguments
    if program == "twotower":
        name, *rest = rest
        module = cli.COMMANDS[name][0]
    else:
        module, *rest = rest[1:]
    options = importlib.import_module(module).parser().parse_intermixed_args(rest)
    if "config" in options:
        load_config(options.config, [item for group in options.set for item in group])
    return 0


def prepare_folder(folder: Path) -> None:
    """Make a folder in which the commands of pages find what they call."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    for name, text in {"python": _SHIM, "twotower": _SHIM, "make": _MAKE, "ray": _RAY}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / ".config" / "fish" / "completions").mkdir(parents=True)
    for name in ("configs", "deploy"):
        (folder / name).symlink_to(ROOT / name)


def run_shell(script: str, folder: Path, answer: Callable[[list[str]], int] = run_in_process) -> str:
    """Run a script of a page in a folder; returns what it printed, and fails where a command did.

    Args:
        script: lines for bash.
        folder: that ``prepare_folder`` made; it is the home folder too.
        answer: runs a job in this process and returns its exit code.
    """
    shims = folder / ".shims"
    shims.mkdir(exist_ok=True)
    calls = shims / "calls"
    if not calls.exists():
        os.mkfifo(calls)
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {
        "HOME": str(folder),
        "PATH": path,
        "SHIMS": str(shims),
        "REAL_PYTHON": sys.executable,
    }
    # Open for both, so that it never ends while no program writes.
    pipe = os.open(calls, os.O_RDWR | os.O_NONBLOCK)
    try:
        with subprocess.Popen(
            ["bash", "-eu", "-c", script],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as shell:
            waited = 0.0
            while shell.poll() is None and waited < _TIMEOUT_S:
                if select.select([pipe], [], [], 0.05)[0]:
                    for name in os.read(pipe, 4096).decode().split():
                        _answer(Path(name), answer)
                else:
                    waited += 0.05
            if shell.poll() is None:
                shell.kill()
            out, err = shell.communicate()
    finally:
        os.close(pipe)
    assert shell.returncode == 0, f"exit code {shell.returncode} of\n{script}\n{out}\n{err}"
    return out


def _answer(reply: Path, answer: Callable[[list[str]], int]) -> None:
    folder, *arguments = Path(f"{reply}.arguments").read_text().split("\0")[:-1]
    said = io.StringIO()
    code = 1
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(said):
            try:
                code = answer(arguments)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
    finally:
        reply.write_text(f"{code}\n{said.getvalue()}")

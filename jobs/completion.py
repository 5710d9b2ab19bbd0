"""Print a script that completes commands, options and keys of the configuration in a shell.

bash:  eval "$(twotower completion bash)"                                    in ~/.bashrc
zsh:   eval "$(twotower completion zsh)"                                     in ~/.zshrc, after compinit
fish:  twotower completion fish > ~/.config/fish/completions/twotower.fish
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.cli import COMMANDS

SHELLS = ("bash", "zsh", "fish")
_FILES = ("FILE", "PATH", "DIR")
"""Metavariables of arguments that are paths."""


@dataclass(frozen=True)
class Option:
    """An option of a command."""

    flag: str
    help: str
    takes: str
    """nothing, files, keys (of the configuration), or value (of any other kind)."""


def parser(program: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog=program or "python -m jobs.completion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    return found


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Print the script; returns the exit code."""
    shell = parser(program).parse_args(argv).shell
    commands = {name: (_options(name), _words(name)) for name in COMMANDS}
    print(_fish(commands) if shell == "fish" else _bash(commands, zsh=shell == "zsh"))
    return 0


Commands = dict[str, tuple[list[Option], list[str]]]


def _actions(name: str) -> Iterator[argparse.Action]:
    yield from importlib.import_module(COMMANDS[name][0]).parser()._actions


def _options(name: str) -> list[Option]:
    found = []
    for action in _actions(name):
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        takes = "value"
        if action.nargs == 0:
            takes = "nothing"
        elif "--set" in action.option_strings:
            takes = "keys"
        elif metavar in _FILES:
            takes = "files"
        found += [
            Option(flag, action.help or "", takes) for flag in action.option_strings if flag.startswith("--")
        ]
    return found


def _words(name: str) -> list[str]:
    """Return the values that a command's own arguments can have, such as the actions of generations."""
    return [
        str(word) for action in _actions(name) if not action.option_strings for word in action.choices or ()
    ]


def _keys() -> list[str]:
    from jobs.reference import config_keys

    return config_keys()


def _bash(commands: Commands, zsh: bool) -> str:
    """Return a script for bash; zsh runs the same through its own bashcompinit."""
    words, files, keys, values = [], [], [], set()
    for name, (options, own) in commands.items():
        flags = " ".join([*own, *(option.flag for option in options)])
        words.append(f"        {name}) words={shlex.quote(flags)} ;;")
        files += [option.flag for option in options if option.takes == "files"]
        values |= {option.flag for option in options if option.takes == "value"}
    files = sorted(set(files))
    keys = [f"{key}=" for key in _keys()]
    head = ["autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    return "\n".join(
        [
            *head,
            "_twotower() {",
            '    local current="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" option="" words="" at',
            "    COMPREPLY=()",
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f"        COMPREPLY=($(compgen -W {shlex.quote(' '.join([*commands, '--help', '--version']))} "
            '-- "$current"))',
            "        return",
            "    fi",
            "    for ((at = COMP_CWORD - 1; at > 1; at--)); do",
            '        case "${COMP_WORDS[at]}" in --*) option="${COMP_WORDS[at]}"; break ;; esac',
            "    done",
            '    case "$current" in -*) option="" ;; esac',
            '    case "$option" in',
            "        --set)",
            "            type compopt >/dev/null 2>&1 && compopt -o nospace",
            f'            COMPREPLY=($(compgen -W {shlex.quote(" ".join(keys))} -- "$current")); return ;;',
            f"        {'|'.join(files)})",
            "            type compopt >/dev/null 2>&1 && compopt -o filenames",
            '            COMPREPLY=($(compgen -f -- "$current")); return ;;',
            f"        {'|'.join(sorted(values))}) return ;;",
            "    esac",
            '    case "$command" in',
            *words,
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
            '    case "$command:$current" in init:-*) ;; init:*)',
            "        type compopt >/dev/null 2>&1 && compopt -o filenames",
            '        COMPREPLY=($(compgen -f -- "$current")) ;;',
            "    esac",
            "}",
            "complete -F _twotower twotower",
        ]
    )


def _fish(commands: Commands) -> str:
    lines = ["complete -c twotower -f", "complete -c twotower -n __fish_use_subcommand -l version"]
    for name, (options, own) in commands.items():
        line = shlex.quote(COMMANDS[name][1])
        lines.append(f"complete -c twotower -n __fish_use_subcommand -a {name} -d {line}")
        here = f"complete -c twotower -n '__fish_seen_subcommand_from {name}'"
        if own:
            lines.append(f"{here} -a {shlex.quote(' '.join(own))}")
        if name == "init":
            lines.append(f"{here} -F")
        for option in options:
            takes = {"nothing": "", "files": " -r -F", "value": " -x"}.get(option.takes, "")
            if option.takes == "keys":
                takes = f" -x -a {shlex.quote(' '.join(f'{key}=' for key in _keys()))}"
            text = shlex.quote(option.help.replace("%%", "%"))
            lines.append(f"{here} -l {option.flag.removeprefix('--')}{takes} -d {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

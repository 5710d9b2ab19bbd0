"""The command twotower: one code path with the modules, quick help, quiet, JSON, completion."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import twotower
from jobs import cli, command, completion, prepare
from jobs.reference import config_keys
from tests.datasets import grid, write_csv
from twotower import progress

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "torch", "faiss", "pandas", "pyarrow", "numpy", "pydantic")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    write_csv(tmp_path / "log.csv", ["user_id", "item_id", "ts"], grid())
    path.write_text(
        f"storage: {{root: {tmp_path / 'runs'}}}\n"
        f"data: {{source: {{kind: files, interactions: {tmp_path / 'log.csv'}, "
        "columns: {time: ts, time_unit: s}}}\n"
    )
    return path


def test_the_script_is_the_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"twotower": "jobs.cli:main"}


def test_every_job_is_a_command_with_a_module_a_main_and_a_parser() -> None:
    shared = {"cli", "command", "completion", "output", "reference", "stages", "__init__"}
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - shared
    assert {name.replace("-", "_") for name in cli.COMMANDS} == jobs | {"init", "doctor", "completion"}
    for module, line in cli.COMMANDS.values():
        found = importlib.import_module(module)
        assert callable(found.main)
        assert callable(found.parser)
        assert "\n" not in line


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io; from jobs import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['--help'])\n"
        "with contextlib.suppress(SystemExit): cli.main(['--version'])\n"
        "cli.main(['trian'])\n"
        f"sys.exit(','.join(m for m in {HEAVY!r} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name, (_, line) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", done.stdout, re.MULTILINE)
    assert f"twotower {twotower.__version__}" in done.stdout
    assert (
        done.stderr == "twotower: 'trian' is no command; did you mean 'train'? twotower --help lists them\n"
    )


@pytest.mark.parametrize("arguments", [["nothing-like-it"], ["--nothing"], []])
def test_what_is_no_command_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["update-items", "update_items"])
def test_help_of_a_command_calls_it_as_it_was_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: twotower update-items")
    assert "twotower update-items --config configs/own-data.yaml --compact" in out
    assert "jobs.update_items" not in out


def test_the_command_and_the_module_do_the_same(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--config", str(config)]) == 0
    module = capsys.readouterr()
    assert cli.main(["prepare", "--config", str(config)]) == 0
    called = capsys.readouterr()
    assert module.out == called.out
    assert module.out.startswith("TWOTOWER_RESULT {")
    assert "== prepare" in module.err
    assert cli.main(["prepare", "--config", str(config), "--set", "split.kind=sideways"]) == 2
    assert capsys.readouterr().err.startswith("\ntwotower prepare: the configuration is not valid")


def test_json_is_all_of_stdout_and_quiet_leaves_stderr_empty(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--config", str(config), "--json", "--quiet", "--result", str(tmp_path / "r.json")]
    assert cli.main(["prepare", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == json.loads((tmp_path / "r.json").read_text())
    assert json.loads(captured.out)["num_users"] == 7
    assert captured.err == ""


def test_quiet_still_tells_what_ends_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "--quiet", "--json", "--config", "missing.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "\ntwotower prepare: config file missing.yaml does not exist\n"


def test_quiet_is_over_when_the_job_is(capsys: pytest.CaptureFixture[str]) -> None:
    def work(config, arguments):
        print("a library that prints")
        progress.say("a line")
        with progress.bar(2, "a bar") as bar:
            bar.update(2)
        return command.Result(lines=["for people"])

    assert command.Job("probe", None, work).run(["--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[0] == "for people"
    progress.say("another")
    assert capsys.readouterr().err == "   another\n"


def test_a_job_that_found_something_says_so_and_exits_with_its_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = command.Result(exit_code=2, remark="2 trials failed")
    assert command.Job("probe", None, lambda config, arguments: result).run([]) == 2
    captured = capsys.readouterr()
    assert captured.out == 'TWOTOWER_RESULT {"job": "probe"}\n'
    assert captured.err == "\njobs.probe: 2 trials failed\n"


def test_keys_for_set_are_those_of_the_configuration() -> None:
    keys = config_keys()
    assert {"train.epochs", "index.num_shards", "storage.root", "model.query_tower.hidden"} <= set(keys)
    assert not [key for key in keys if "[" in key or "NAME" in key]


def _completed(script: str, *words: str) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    asked = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _twotower"
    code = f"{script}\n{asked}\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    # Outside of a completion bash has nothing to set options of.
    assert [line for line in done.stderr.splitlines() if "compopt" not in line] == []
    return done.stdout.split()


def test_bash_completes_commands_options_keys_files_and_actions(capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main(["bash"]) == 0
    script = capsys.readouterr().out
    assert _completed(script, "twotower", "up") == ["update-items"]
    assert set(_completed(script, "twotower", "")) == {*cli.COMMANDS, "--help", "--version"}
    assert _completed(script, "twotower", "update-items", "--del") == ["--delete", "--delete-id"]
    assert _completed(script, "twotower", "train", "--set", "train.epo") == ["train.epochs="]
    assert "seed=" in _completed(script, "twotower", "train", "--set", "train.epochs=3", "se")
    assert _completed(script, "twotower", "serve", "--config", "configs/own") == ["configs/own-data.yaml"]
    assert _completed(script, "twotower", "generations", "ro") == ["rollback"]
    assert _completed(script, "twotower", "init", "READ") == ["README.md"]
    assert _completed(script, "twotower", "generations", "--keep", "") == []


def test_scripts_of_all_shells_name_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in completion.SHELLS:
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert [name for name in cli.COMMANDS if name not in script] == []
        if shell != "fish":
            subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)
        if (found := shutil.which(shell)) and shell != "bash":
            subprocess.run([found, "-n"], input=script, text=True, check=True, timeout=60)

"""deploy/ray.env and the Python that reads it say the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twotower.environment import DEFAULTS, RAY_ENV_PATH, apply_environment, read_settings


def sourced(**extra: str) -> dict[str, str]:
    """Return the environment after sourcing deploy/ray.env in sh, with a token so that no Ray is started."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere", "RAY_AUTH_TOKEN": "x", **extra}
    out = subprocess.run(
        ["sh", "-euc", f". {RAY_ENV_PATH}; env -0"],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
    )
    assert out.stderr == ""
    return dict(entry.split("=", 1) for entry in out.stdout.split("\0") if "=" in entry)


def test_file_and_built_in_table_agree() -> None:
    assert RAY_ENV_PATH.is_file()
    assert read_settings() == DEFAULTS
    assert len(DEFAULTS) > 5


def test_every_export_of_the_file_is_read() -> None:
    exported = [line for line in RAY_ENV_PATH.read_text().splitlines() if line.startswith("export ")]
    assert len(exported) == len(read_settings())


def test_a_shell_gets_what_python_gets() -> None:
    found = sourced()
    assert {name: found[name] for name in DEFAULTS} == apply_environment({})


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_set_variable_keeps_its_value_in_both(name: str) -> None:
    given = "7"
    assert DEFAULTS[name] != given
    environment = {name: given}
    assert apply_environment(environment)[name] == given
    assert environment[name] == given
    assert sourced(**{name: given})[name] == given


def test_an_empty_variable_counts_as_not_set_in_both() -> None:
    name = "RAY_SERVE_ENABLE_HA_PROXY"
    assert apply_environment({name: ""})[name] == "1"
    assert sourced(**{name: ""})[name] == "1"


def test_without_the_file_the_built_in_table_is_used(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "ray.env") == DEFAULTS


def test_a_token_is_made_where_there_is_none(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    called = tmp_path / "called"
    (binaries / "ray").write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    (binaries / "ray").chmod(0o755)
    environment = {"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    command = ["sh", "-euc", f". {RAY_ENV_PATH}"]
    subprocess.run(command, env=environment, check=True)
    assert called.read_text().split() == ["get-auth-token", "--generate"]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    called.unlink()
    subprocess.run(command, env=environment, check=True)
    subprocess.run(command, env={**environment, "RAY_AUTH_MODE": "disabled", "HOME": "/nowhere"}, check=True)
    assert not called.exists()


def test_ray_is_not_imported() -> None:
    code = "import sys; import twotower.environment; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

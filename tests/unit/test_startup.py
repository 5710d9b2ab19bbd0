"""What every Python that tests start does first, beside what Ray does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

SCRIPT = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['GIVEN'], os.environ['KEPT']]))"


def become_worker(script: Path, variables: dict[str, str], startup: bool) -> tuple[Any, bool]:
    """Return what the worker has, and whether Ray was imported on the way."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    program = Path(spec.origin).parent / "_private" / "workers" / "setup_worker.py"
    context = {"command_prefix": [], "env_vars": variables, "py_executable": sys.executable}
    words = [f"--serialized-runtime-env-context={json.dumps(context)}", "--language=PYTHON", "--hash=1"]
    environment = os.environ | {"KEPT": "a b", "PYTHONPROFILEIMPORTTIME": "1"}
    environment["PYTHONPATH"] = str(ROOT / "tests" / "startup") if startup else ""
    done = subprocess.run(
        [sys.executable, str(program), str(script), "one word", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout), any(line.split()[-1:] == ["ray"] for line in done.stderr.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(("value", "imported"), [("it's 1", False), ("${KEPT}/1", True)])
def test_a_worker_has_what_ray_gives_it(tmp_path: Path, value: str, imported: bool) -> None:
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    expected = become_worker(script, {"GIVEN": value}, startup=False)
    assert expected[1]
    assert become_worker(script, {"GIVEN": value}, startup=True) == (expected[0], imported)

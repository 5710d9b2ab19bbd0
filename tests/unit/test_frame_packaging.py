"""pyproject.toml, the pins, the Makefile and the files beside them say the same."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLAVOURS = {"cpu": "2.13.0", "gpu": "2.15.0"}


def _pins(flavour: str) -> dict[str, Version]:
    pins: dict[str, Version] = {}
    for line in (ROOT / "requirements" / f"{flavour}.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!]+)", line)
        assert match, f"{line!r} is not a plain pin (no index, hash, local version or range)"
        name = canonicalize_name(match[1])
        assert name not in pins, f"{name} is pinned twice"
        pins[name] = Version(match[2])
    assert len(pins) > 50
    return pins


@pytest.mark.parametrize(("flavour", "torch"), FLAVOURS.items())
def test_every_line_is_a_pin_that_any_index_serves(flavour, torch):
    pins = _pins(flavour)
    assert pins["torch"] == Version(torch)
    assert pins["ray"] == Version("2.60.0")
    assert all(version.local is None for version in pins.values())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_pins_satisfy_the_project_and_its_extras(flavour):
    pins = _pins(flavour)
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *extras[flavour],
        *extras["dev"],
        *PROJECT["build-system"]["requires"],
    ]
    for text in wanted:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned in requirements/{flavour}.txt"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is outside {requirement}"


def test_the_two_flavours_differ_only_in_torch_faiss_and_cuda():
    cpu, gpu = _pins("cpu"), _pins("gpu")
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {"torch"}
    assert cpu.keys() - gpu.keys() == {"faiss-cpu"}
    cuda = re.compile(r"nvidia-.*|cuda-.*|lib(cuvs|raft|rmm)-cu\d+|rapids-logger|triton|faiss-gpu-cuvs")
    assert all(cuda.fullmatch(name) for name in gpu.keys() - cpu.keys()), gpu.keys() - cpu.keys()
    assert gpu["faiss-gpu-cuvs"] == Version("1.15.1")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_installed_packages_that_are_pinned_have_the_pinned_version(flavour):
    from importlib.metadata import distributions

    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in distributions()}
    pins = _pins(flavour)
    if (flavour == "gpu") != ("faiss-gpu-cuvs" in installed):
        pytest.skip(f"this environment is not of flavour {flavour}")
    found = {name: installed.get(name) for name in pins}
    wrong = {n: str(v) for n, v in found.items() if v is None or Version(v.public) != pins[n]}
    assert not wrong


def test_packages_are_listed_one_by_one():
    folders = {
        str(p.parent.relative_to(ROOT)).replace("/", ".")
        for root in ("twotower", "jobs", "serve")
        for p in (ROOT / root).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_python_and_licence():
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_targets_of_the_makefile():
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", "help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    targets = re.findall(r"^  make (\w+)", done.stdout, re.MULTILINE)
    assert {"setup", "quickstart", "test", "serve", "lint", "help"} <= set(targets)
    assert len(targets) <= 10


def test_an_old_python_is_named_before_anything_is_installed(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").write_bytes((ROOT / "requirements" / "cpu.txt").read_bytes())
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "-C", str(tmp_path), f"PYTHON={old}", "setup"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "older than Python 3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_uploads_leave_out_what_is_not_code():
    ignored = (ROOT / ".rayignore").read_text().split()
    assert {".venv/", "runs/", ".git/"} <= set(ignored)


def test_shell_scripts_are_valid():
    for script in (".ci/run", "deploy/ray.env"):
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=60)

"""Artefact directories: what a reader sees while one is built, and after the builder is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twotower import artefacts
from twotower.errors import ArtefactError

_DEADLINE_S = 30.0

# Builds DIRECTORY, says so in READY, and then hangs in the middle of the build.
_BUILDER = """
import sys, time
from pathlib import Path
from twotower import artefacts
directory, ready, with_manifest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "manifest"
with artefacts.building(directory) as partial:
    (partial / "data.bin").write_bytes(b"half")
    if with_manifest:
        artefacts.write_manifest(partial, "dataset", {"rows": 1})
    ready.touch()
    time.sleep(600)
"""


def _build(directory: Path, content: bytes = b"whole", kind: str = "dataset") -> None:
    with artefacts.building(directory) as partial:
        (partial / "part").mkdir()
        (partial / "part" / "data.bin").write_bytes(content)
        artefacts.write_manifest(partial, kind, {"rows": len(content)})


def _start_builder(directory: Path, ready: Path, manifest: str = "none") -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", _BUILDER, str(directory), str(ready), manifest])
    deadline = time.monotonic() + _DEADLINE_S
    while not ready.exists():
        assert process.poll() is None, "the builder ended by itself"
        assert time.monotonic() < deadline, "the builder did not get to work"
        time.sleep(0.01)
    return process


def test_a_finished_build_is_visible_with_all_its_files(tmp_path):
    _build(tmp_path / "a")
    assert artefacts.has_manifest(tmp_path / "a")
    assert artefacts.read_manifest(tmp_path / "a", "dataset")["rows"] == 5
    assert (tmp_path / "a" / "part" / "data.bin").read_bytes() == b"whole"
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


def test_nothing_is_visible_before_the_build_ends(tmp_path):
    with artefacts.building(tmp_path / "a") as partial:
        artefacts.write_manifest(partial, "dataset", {})
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").exists()


def test_an_error_inside_a_build_leaves_the_old_artefact(tmp_path):
    _build(tmp_path / "a", b"old")

    def fail():
        with artefacts.building(tmp_path / "a") as partial:
            artefacts.write_manifest(partial, "dataset", {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a" / "part" / "data.bin").read_bytes() == b"old"


def test_a_build_without_a_manifest_is_refused(tmp_path):
    with (
        pytest.raises(ArtefactError, match="without a manifest"),
        artefacts.building(tmp_path / "a") as partial,
    ):
        (partial / "data.bin").write_bytes(b"x")
    assert not (tmp_path / "a").exists()


def test_a_rebuild_replaces_the_artefact(tmp_path):
    _build(tmp_path / "a", b"old")
    _build(tmp_path / "a", b"newer")
    assert (tmp_path / "a" / "part" / "data.bin").read_bytes() == b"newer"


@pytest.mark.parametrize("manifest", ["none", "manifest"])
def test_a_killed_build_leaves_nothing_visible_and_can_be_repeated(tmp_path, manifest):
    directory = tmp_path / "a"
    process = _start_builder(directory, tmp_path / "ready", manifest)
    process.kill()
    assert process.wait(_DEADLINE_S) == -signal.SIGKILL
    assert not directory.exists()
    assert (tmp_path / ".a.partial" / "data.bin").exists(), "the build was not killed in the middle"

    _build(directory)  # would wait for ever if the lock had outlived its holder
    assert artefacts.read_manifest(directory, "dataset")["rows"] == 5
    assert not (directory / "data.bin").exists(), "a file of the killed build came along"


def test_keep_partial_lets_a_builder_go_on(tmp_path):
    process = _start_builder(tmp_path / "a", tmp_path / "ready")
    process.kill()
    process.wait(_DEADLINE_S)
    with artefacts.building(tmp_path / "a", keep_partial=True) as partial:
        assert (partial / "data.bin").read_bytes() == b"half"
        artefacts.write_manifest(partial, "dataset", {})
    assert (tmp_path / "a" / "data.bin").read_bytes() == b"half"


def test_a_second_builder_waits_for_the_first(tmp_path):
    first = _start_builder(tmp_path / "a", tmp_path / "ready1")
    second = subprocess.Popen(
        [sys.executable, "-c", _BUILDER, str(tmp_path / "a"), str(tmp_path / "ready2"), "none"]
    )
    try:
        # The second gets to work only after the first is gone.
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1.0)
        assert not (tmp_path / "ready2").exists()
        first.kill()
        deadline = time.monotonic() + _DEADLINE_S
        while not (tmp_path / "ready2").exists():
            assert time.monotonic() < deadline, "the lock outlived its holder"
            time.sleep(0.01)
    finally:
        for process in (first, second):
            process.kill()
            process.wait(_DEADLINE_S)


def test_write_bytes_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "f"
    artefacts.write_bytes(path, b"old")

    def fail(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        artefacts.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1.0, float("-inf")]}])
def test_json_has_no_nan_or_infinity(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        artefacts.write_json(tmp_path / "f.json", value)
    assert not (tmp_path / "f.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a finished dataset"),
        (b"{", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[1]", "holds a list, not a dataset"),
        (b'{"kind": "checkpoint", "schema_version": 1}', "holds a checkpoint, not a dataset"),
        (b'{"kind": "dataset", "schema_version": 99}', "schema version 99"),
    ],
)
def test_a_reader_refuses_what_is_no_finished_artefact(tmp_path, content, message):
    if content is not None:
        (tmp_path / artefacts.MANIFEST).write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        artefacts.read_manifest(tmp_path, "dataset")


def test_fingerprints_depend_on_content_only():
    assert artefacts.fingerprint({"a": 1, "b": [2]}) == artefacts.fingerprint({"b": [2], "a": 1})
    assert artefacts.fingerprint({"a": 1}) != artefacts.fingerprint({"a": 2})
    assert len(artefacts.fingerprint("x")) == 16


def test_a_manifest_names_its_kind_and_schema_version(tmp_path):
    artefacts.write_manifest(tmp_path, "report", {"metrics": {"recall@10": 0.5}})
    assert json.loads((tmp_path / artefacts.MANIFEST).read_text()) == {
        "kind": "report",
        "schema_version": artefacts.SCHEMA_VERSION,
        "metrics": {"recall@10": 0.5},
    }

"""What tests of stores in a bucket look at and change."""

from __future__ import annotations

import json
from pathlib import Path

from tests.generations import edit_manifest
from twotower.artefacts import MANIFEST
from twotower.generations.files import file_facts
from twotower.generations.objects import Objects
from twotower.generations.store import Store


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def keys(store: Store, prefix: str) -> list[str]:
    return sorted(o.key for o in Objects(store.where).list(prefix))


def hashes(store: Store, name: str) -> set[str]:
    return {
        f"objects/{f['sha256']}"
        for f in json.loads((store.path(name) / MANIFEST).read_text())["files"].values()
    }


def change(store: Store, name: str, file: str = "popularity.npy") -> None:
    """Give a local generation a file of its own."""
    path = store.path(name)
    data = bytearray((path / file).read_bytes())
    data[-1] ^= 1
    (path / file).unlink()
    (path / file).write_bytes(bytes(data))
    files = json.loads((path / MANIFEST).read_text())["files"]
    edit_manifest(path, files={**files, file: file_facts(path / file)})

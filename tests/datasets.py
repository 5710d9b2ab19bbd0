"""Small raw data and configurations for tests of the data floor."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from twotower.config import Config, parse_config

NAMES = {"user": "who", "item": "what", "time": "when"}


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    """Write a CSV file without quoting."""
    lines = [",".join(header), *(",".join("" if v is None else str(v) for v in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def grid(num_users: int = 7, per_user: int = 10, num_items: int = 23) -> list[list[Any]]:
    """Return user, item, second of per_user different items for each user."""
    return [
        [f"u{u}", f"i{(5 * u + 3 * n) % num_items}", 1_000 * u + 10 * n]
        for u in range(num_users)
        for n in range(per_user)
    ]


def files_config(root: Path, interactions: Path | str, **changes: Any) -> Config:
    """Return a configuration for files; keys of ``changes`` are dotted with __ and override the defaults."""
    values: dict[str, Any] = {
        "storage": {"root": str(root)},
        "data": {
            "source": {
                "kind": "files",
                "interactions": str(interactions),
                "columns": {**NAMES, "time_unit": "s"},
            }
        },
    }
    for key, value in changes.items():
        node = values
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return parse_config(values)


def write_zip(path: Path, members: dict[str, str | bytes]) -> Path:
    """Write a zip file of the given members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path

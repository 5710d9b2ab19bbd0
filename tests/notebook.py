"""A notebook without Jupyter: its cells one after the other, in one namespace."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

CELL_KEYS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "execution_count", "id", "metadata", "outputs", "source"},
}


def read(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook of format 4.5, checked by hand."""
    notebook = json.loads(path.read_text())
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells: list[dict[str, Any]] = notebook["cells"]
    for cell in cells:
        assert set(cell) == CELL_KEYS[cell["cell_type"]], cell
        assert isinstance(cell["source"], list)
        assert all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            # What it shows is made by whoever runs it.
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert len({cell["id"] for cell in cells}) == len(cells)
    return cells


def run(path: Path) -> dict[str, Any]:
    """Run the code cells of a notebook in the working directory, and return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in read(path):
        if cell["cell_type"] == "code":
            begin = time.monotonic()
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            print(f"{cell['id']}: {time.monotonic() - begin:.1f} s", file=sys.stderr)
    return names


if __name__ == "__main__":
    found = run(Path(sys.argv[1]))
    kinds = dict(zip(found["catalogue"]["name"], found["catalogue"]["kind"], strict=True))
    print(
        json.dumps(
            {
                "ray": "ray" in sys.modules,
                "recall": found["recall"],
                "unknown": [kinds[item["title"]] for item in found["unknown"].items],
                "cocoa": [kinds[item["title"]] for item in found["only_cocoa"].items],
                "figures": found["plt"].get_fignums(),
            }
        )
    )

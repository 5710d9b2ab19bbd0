"""Users out of reports, which show a few as examples: in report.json, and between comments in report.html.

The comments name an example's ``key``, so that it is found without reading the page's markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from twotower.artefacts import MANIFEST, link_or_copy, read_manifest, write_bytes, write_json, write_manifest
from twotower.errors import ArtefactError
from twotower.jsonfiles import check_shape, read_json
from twotower.listing import STORED

KIND = "report"
_NUMBERS, _PAGE = "report.json", "report.html"


class _Example(BaseModel):
    """A user who is shown."""

    model_config = STORED

    user_id: str
    key: str


class _Content(BaseModel):
    """What is read of report.json."""

    model_config = STORED

    examples: list[_Example] = []


@dataclass(frozen=True)
class ShownUsers:
    """A report that shows users to be forgotten."""

    path: Path
    content: dict[str, Any]
    """Of report.json."""
    found: frozenset[str]
    """Users to be forgotten that it shows."""

    @classmethod
    def of(cls, path: Path, ids: Sequence[str]) -> ShownUsers:
        """Look for users in a finished report.

        Raises:
            ArtefactError: it is damaged.
        """
        read_manifest(path, KIND)
        again = f"Delete {path} and evaluate again."
        numbers = path / _NUMBERS
        content = read_json(numbers, again) if numbers.is_file() else {}
        check_shape(content, _Content, str(numbers), again)
        shown = {example["user_id"] for example in content.get("examples", [])}
        return cls(path, content, frozenset(shown & set(ids)))

    def write(self, directory: Path) -> None:
        """Write the report without these users into an empty directory, the manifest last.

        Raises:
            ArtefactError: the page does not mark one of them.
        """
        gone = [e for e in self.content["examples"] if e["user_id"] in self.found]
        for file in sorted(self.path.iterdir()):
            if file.name not in (MANIFEST, _NUMBERS, _PAGE):
                link_or_copy(file, directory / file.name)
        kept = [e for e in self.content["examples"] if e["user_id"] not in self.found]
        write_json(directory / _NUMBERS, {**self.content, "examples": kept})
        if (self.path / _PAGE).is_file():
            page = (self.path / _PAGE).read_bytes()
            for example in gone:
                key = re.escape(example["key"].encode())
                page, count = re.subn(rb"<!--user %s-->.*?<!--/user-->" % key, b"", page, flags=re.DOTALL)
                if count != 1:
                    raise ArtefactError(
                        f"{self.path / _PAGE} does not mark an example user that {_NUMBERS} names; delete "
                        f"{self.path}"
                    )
            write_bytes(directory / _PAGE, page)
        manifest = read_manifest(self.path, KIND)
        write_manifest(
            directory, KIND, {k: v for k, v in manifest.items() if k not in ("kind", "schema_version")}
        )

"""The pointers in a bucket, and the log of what they named.

A pointer's object holds its last publication and that one's number, so that a publisher who is killed before
he writes the log leaves nothing unsaid: readers add it, and the next publisher writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from twotower.errors import ArtefactError, UnavailableError
from twotower.generations.names import checked_pointer
from twotower.generations.objects import Content, Objects, at_once
from twotower.generations.publications import Publication
from twotower.jsonfiles import check_shape, parse_json

_REMEDY = "It holds no publication; remove it."
_NUMBER = Annotated[int, Field(strict=True, ge=1, lt=1 << 53)]
_POINTERS, _LOG = "pointers/", "publications/"


@dataclass(frozen=True)
class BucketPointer:
    """What a pointer's object holds."""

    entry: Publication
    number: int
    """Of the publications of this pointer, from 1."""
    content: Content


class BucketPointers:
    """Pointers below a URL, each replaced by compare-and-swap, and their log."""

    def __init__(self, objects: Objects) -> None:
        """Take the bucket; nothing is read yet."""
        self._objects = objects

    def named(self) -> tuple[dict[str, str], list[str]]:
        """Return the id that each pointer names, by its name, and what can not be read as one, by why."""
        found, passed = {}, []
        for name in self._names():
            try:
                pointer = self.get(name)
            except UnavailableError:
                raise
            except ArtefactError as error:
                passed.append(str(error))
                continue
            if pointer is not None:
                found[name] = pointer.entry.id
        return found, passed

    def _names(self) -> list[str]:
        return sorted(o.key.removeprefix(_POINTERS) for o in self._objects.list(_POINTERS))

    def get(self, pointer: str) -> BucketPointer | None:
        """Return what a pointer's object holds; None when it was never set.

        Raises:
            ArtefactError: it holds no publication.
        """
        key = f"{_POINTERS}{checked_pointer(pointer)}"
        content = self._objects.get(key)
        return None if content is None else self._parse(content, key)

    def swap(self, entry: Publication, replaced: BucketPointer | None) -> BucketPointer | None:
        """Set a pointer if nobody else has set it since; returns what it holds now, None if that was not so.

        Args:
            entry: what is published; its pointer is set.
            replaced: what the pointer must still hold; None when it must not be there.
        """
        number = 1 if replaced is None else replaced.number + 1
        data = json.dumps({**entry.to_json(), "number": number}).encode()
        key = f"{_POINTERS}{entry.pointer}"
        if not self._objects.swap(key, data, None if replaced is None else replaced.content):
            return None
        return BucketPointer(entry, number, Content(data, {}))

    def log(self, pointer: BucketPointer) -> None:
        """Write what a pointer holds into the log, unless it is there."""
        self._objects.swap(_log_key(pointer), pointer.content.data, None)

    def publications(self) -> list[Publication]:
        """Return what was published and rolled back; those of each pointer in order.

        Raises:
            ArtefactError: an object of the log or of a pointer holds no publication.
        """
        keys = [o.key for o in self._objects.list(_LOG)]
        contents = dict(zip(keys, at_once(self._objects.get, keys), strict=True))
        entries = {
            key: self._parse(content, key).entry for key, content in contents.items() if content is not None
        }
        for name in self.named()[0]:
            # The last one may not have been logged: its publisher was killed.
            if (found := self.get(name)) is not None:
                entries.setdefault(_log_key(found), found.entry)
        return [entries[key] for key in sorted(entries)]

    def _parse(self, content: Content, key: str) -> BucketPointer:
        where = f"{self._objects.url}/{key}"
        value = parse_json(content.data, where, _REMEDY)
        entry = Publication.from_json(value, where)
        number = check_shape(value.get("number"), _NUMBER, where, _REMEDY)
        return BucketPointer(entry, number, content)


def _log_key(pointer: BucketPointer) -> str:
    return f"{_LOG}{pointer.entry.pointer}/{pointer.number:08d}.json"

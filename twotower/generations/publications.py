"""What was published when, over which objections: the log of a store's pointers, and the gates before it.

A local store keeps the log in ``publications.jsonl``. A line is written before its pointer is set, so that
a publisher who is killed in between leaves a line that never took effect; readers tell it by the pointer.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from twotower.errors import ArtefactError
from twotower.jsonfiles import check_shape, parse_json
from twotower.listing import STORED, Name

LOG = "publications.jsonl"


class _Entry(BaseModel):
    """A publication as it is stored."""

    model_config = STORED

    time: str
    pointer: Name
    id: Name
    previous: Name | None
    action: Literal["publish", "rollback", "forget"]
    forced: bool
    reasons: list[str]


@dataclass(frozen=True)
class Publication:
    """One setting of a pointer."""

    time: str
    """When, ISO 8601 in UTC."""
    pointer: str
    """Which pointer."""
    id: str
    """The generation that it names since."""
    previous: str | None
    """The generation that it named before; None when it was never set."""
    action: Literal["publish", "rollback", "forget"] = "publish"
    """What was asked for; forget is the same generation without some users."""
    forced: bool = False
    """Whether gates were to be overridden."""
    reasons: tuple[str, ...] = ()
    """What spoke against it and was overridden."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**dataclasses.asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Publication:
        """Return the publication of ``to_json``.

        Args:
            value: what was read.
            where: it was read from, for the error.

        Raises:
            ArtefactError: it is none.
        """
        entry = check_shape(value, _Entry, where, "It holds no publication; remove it.")
        known = {field.name: getattr(entry, field.name) for field in dataclasses.fields(cls)}
        return cls(**{**known, "reasons": tuple(entry.reasons)})


def now() -> str:
    """Return the time of a publication that happens now."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def reasons_against(index: Mapping[str, Any]) -> list[str]:
    """Return what speaks against publishing a generation, each a sentence.

    Args:
        index: ``index`` of its manifest.
    """
    reasons = []
    recall, target = float(index["index_recall"]), float(index["target_index_recall"])
    if recall < target:
        reasons.append(
            f"its {index['factory']} index finds {recall:.4f} of the top {index['recall_k']} of "
            f"{index['num_queries']} real queries, the target is {target}; use another index.kind or "
            "index.factory, or lower index.target_index_recall"
        )
    limit = index.get("max_search_ms")
    if limit is not None and (p50 := float(index["search_ms"]["p50"])) > limit:
        reasons.append(
            f"a search takes {p50:.3f} ms (median), index.max_search_ms is {limit}; use another index.kind, "
            "lower index.target_index_recall, or allow more"
        )
    return reasons


def earlier(
    publications: Iterable[Publication], pointer: str, current: str, successors: Mapping[str, str]
) -> list[str]:
    """Return what a pointer named before, as steps to roll back to, the latest first.

    A roll back undoes a publication, so that two of them go two steps back.

    Args:
        publications: of any pointers, in order.
        pointer: the pointer.
        current: what it names now.
        successors: by id, the generation that stands in the place of one that held forgotten users.
    """
    steps: list[str] = []
    for entry in publications:
        if entry.pointer != pointer:
            continue
        # What the pointer never came to name, or what was set without the log.
        if entry.previous is not None:
            _unwind(steps, successors.get(entry.previous, entry.previous))
        name = successors.get(entry.id, entry.id)
        if entry.action == "publish":
            steps.append(name)
        else:
            # Who forgets users goes no step further.
            _unwind(steps, name)
    _unwind(steps, current)
    return steps[-2::-1]


def _unwind(steps: list[str], last: str) -> None:
    """Drop steps until the last is the one given."""
    if last in steps:
        del steps[len(steps) - steps[::-1].index(last) :]
    else:
        steps.append(last)


def read_log(path: Path) -> list[Publication]:
    """Return the publications of a local log, in order; none where there is no log.

    Raises:
        ArtefactError: a line is none.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ArtefactError(f"{path} can not be read ({error.strerror}); let this user read it") from None
    entries = []
    # What follows the last line end was cut short by a kill.
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        where = f"line {number} of {path}"
        entries.append(Publication.from_json(parse_json(line, where, "Remove that line."), where))
    return entries


def append(path: Path, entry: Publication) -> None:
    """Add a line to a local log and flush it to disk; the caller holds the store's lock."""
    path.touch()
    with open(path, "r+b") as file:
        file.seek(file.read().rfind(b"\n") + 1)
        file.truncate()
        file.write(json.dumps(entry.to_json(), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())

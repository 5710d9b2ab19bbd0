"""Vocabularies that hold forgotten users: what was made with one of them is not published again.

A build that ran while users were forgotten, a copy in another machine's cache, or a dataset prepared again
from the same raw files would bring them back. So a store keeps the hashes of vocabularies as they were. Who
knows all other ids could try which one completes such a hash: it is stored salted and slow to compute.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, Field

from twotower.jsonfiles import check_shape, parse_json
from twotower.listing import STORED

SUPERSEDED = "superseded.json"


class _Content(BaseModel):
    """The content of the store's file."""

    model_config = STORED

    salt: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]
    vocabularies: list[str]


def holds(data: bytes | None, vocabulary_hash: str, where: str) -> bool:
    """Return whether a vocabulary is superseded.

    Args:
        data: of the store's file; None where there is none.
        vocabulary_hash: from a manifest.
        where: the data is from, for the error.

    Raises:
        ArtefactError: the data is damaged.
    """
    if data is None:
        return False
    content = _parsed(data, where)
    return _slow(vocabulary_hash, content["salt"]) in content["vocabularies"]


def added(data: bytes | None, vocabulary_hashes: Iterable[str], where: str) -> bytes:
    """Return the file with more vocabularies; the same bytes where it has them all."""
    fresh: dict[str, Any] = {"salt": secrets.token_hex(16), "vocabularies": []}
    content = fresh if data is None else _parsed(data, where)
    known = content["vocabularies"]
    new = {_slow(each, content["salt"]) for each in vocabulary_hashes} - set(known)
    if data is not None and not new:
        return data
    return json.dumps({**content, "vocabularies": sorted([*known, *new])}).encode()


def _slow(vocabulary_hash: str, salt: str) -> str:
    return hashlib.scrypt(vocabulary_hash.encode(), salt=bytes.fromhex(salt), n=1 << 14, r=8, p=1).hex()


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    remedy = (
        "Restore it from a copy, or remove it and run jobs.forget again for the users who were forgotten."
    )
    content: dict[str, Any] = parse_json(data, where, remedy)
    check_shape(content, _Content, where, remedy)
    return content

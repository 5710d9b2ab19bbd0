"""What the manifest of a generation holds, and what the JSON beside it does: checked whenever it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from twotower.artefacts import parse_manifest, read_manifest
from twotower.listing import STORED, Count, Files, Name

KIND = "generation"
BASE, DELTA = "base", "delta"
"""Roles of shards: built from the whole catalogue, or holding what updates changed since."""
_Some = Annotated[int, Field(ge=1, lt=1 << 31)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]


class EffortFacts(BaseModel):
    """How hard a search looks."""

    model_config = {**STORED, "extra": "forbid"}

    nprobe: _Some = 1
    ef_search: _Some = 1
    k_factor: _Positive = 1.0


class CurvePoint(BaseModel):
    """Measured at one effort."""

    model_config = STORED

    effort: EffortFacts
    index_recall: float
    search_ms: float


class TimingFacts(BaseModel):
    """Of one strategy at one share of the items."""

    model_config = STORED

    ms: _Positive
    effort: EffortFacts


class PlanPoint(BaseModel):
    """Strategies at one share of the items."""

    model_config = STORED

    share: _Positive
    timings: dict[Literal["gather", "selector", "over_fetch"], TimingFacts]


class Plan(BaseModel):
    """How to search among some of the items."""

    model_config = STORED

    points: list[PlanPoint]


class SearchTimes(BaseModel):
    """Milliseconds of single searches."""

    model_config = STORED

    p50: _NotNegative
    p99: _NotNegative


class IndexFacts(BaseModel):
    """What a build measured."""

    model_config = STORED

    factory: str
    reason: str = ""
    effort: EffortFacts
    index_recall: float
    target_index_recall: float
    recall_k: Count
    num_queries: Count
    search_ms: SearchTimes
    max_search_ms: float | None = None
    curve: list[CurvePoint] = []
    filters: Plan | None = None


class ShardFacts(BaseModel):
    """The content of ``shard.json``."""

    model_config = STORED

    rows: Count
    factory: str
    checkpoint_fingerprint: str


class ShardEntry(ShardFacts):
    """A shard in the manifest."""

    name: Name
    role: Literal["base", "delta"]


class DeltaFacts(BaseModel):
    """What differs from the full build."""

    model_config = STORED

    base: Name
    added: Count
    changed: Count
    deleted: Count
    share: _NotNegative


def _apart(shards: list[ShardEntry]) -> list[ShardEntry]:
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        raise ValueError("two shards have the same name")
    if sum(shard.role == DELTA for shard in shards) > 1:
        raise ValueError("there is more than one delta")
    return shards


class GenerationManifest(BaseModel):
    """The manifest of a generation."""

    model_config = STORED

    id: Name
    created: str
    checkpoint_fingerprint: str
    dataset_fingerprint: str
    vocabulary_hash: str
    embedding_dim: _Some
    metric: str
    num_items: Count
    as_of: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None
    shards: Annotated[list[ShardEntry], AfterValidator(_apart)]
    delta: DeltaFacts | None
    files: Files
    index: IndexFacts
    replaces: list[Name] = []

    @model_validator(mode="after")
    def _counted(self) -> GenerationManifest:
        if self.num_items > sum(shard.rows for shard in self.shards):
            raise ValueError(f"it has {self.num_items} items, and its shards have fewer")
        return self


def generation_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a finished generation.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    return read_manifest(directory, KIND, GenerationManifest)


def parse_generation(data: bytes, place: str) -> dict[str, Any]:
    """Return the manifest of a generation in the bytes of its file, which are from a place.

    Raises:
        ArtefactError: it is damaged.
    """
    return parse_manifest(data, place, KIND, GenerationManifest)

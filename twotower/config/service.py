"""Sections of what comes after training: storage, index, evaluation, service, and the cluster's resources."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from twotower.config.index_kinds import INDEX_KINDS
from twotower.config.section import NonNegativeInt, PositiveInt, Section
from twotower.registry import NameIn


def check_store_url(url: str) -> str:
    """Return the URL of a place for generations.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"(s3|gs)://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._=-]+)*/?", url):
        raise ValueError(
            f"{url} is no place for generations; give s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, or null for "
            "a folder below storage.root"
        )
    return url


class StorageConfig(Section):
    """Where artefacts live."""

    root: str = "runs"
    """Folder of all artefacts; may be relative to the working directory, but not on a remote cluster."""

    store: Annotated[str, AfterValidator(check_store_url)] | None = None
    """Bucket of the generations, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX; null keeps them in ``root``."""
    keep_generations: PositiveInt | None = None
    """Newest generations that stay after a job published, beside those that pointers name; null keeps all."""

    @property
    def path(self) -> Path:
        """The absolute root."""
        return Path(self.root).expanduser().absolute()


class AttributeConfig(Section):
    """A column of the item table that queries can filter by."""

    column: str | None = None
    """Column of the item table; null takes the attribute's name."""
    type: Literal["auto", "text", "integer", "number", "boolean", "time"] = "auto"
    """What its values are read as; auto takes the column's own type, and everything in a CSV file is text."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """What separates the values of a text column that holds several."""


@INDEX_KINDS.model
class IndexConfig(Section):
    """The FAISS index of the catalogue, and the recall that it must reach."""

    kind: Annotated[str, NameIn(INDEX_KINDS, also=("auto",))] = "auto"
    """Kind of each shard; auto chooses by the catalogue, memory, updates and filters, and says why. cagra is
    built on GPUs."""
    factory: str | None = None
    """FAISS factory string of each shard, such as IVF256,SQ8, in place of a kind."""
    num_shards: PositiveInt = 2
    """Shards; an item's shard is a stable hash of its id."""
    shard_items: PositiveInt | None = None
    """Items that a shard has on average at most; as many shards as that takes, in place of num_shards."""
    target_index_recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Smallest share of the exact top k that the index must find; below it publishing is refused."""
    recall_k: PositiveInt = 100
    """k of that measurement, and of the comparison with the generation in use."""
    max_search_ms: Annotated[float, Field(gt=0)] | None = None
    """Longest median time of a single search, in milliseconds; above it publishing is refused."""
    max_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Most memory of all shards of an open index, in GiB; auto chooses within it, a kind is checked."""
    max_recall_drop: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the recall of the generation in use that a new one may lose, over items that both know."""
    updates: bool = True
    """Whether items are to be changed and deleted between builds; auto then searches more items exactly."""
    max_delta_share: Annotated[float, Field(gt=0)] | None = 0.05
    """Items that updates changed, over those of the build, above which update_items compacts; null never."""
    num_recall_queries: PositiveInt = 256
    """Real queries that recall is reported on; as many others tune the search."""
    train_points: PositiveInt | None = None
    """Vectors that train an IVF index, drawn over all shards; null takes 64 for each list."""
    kept_history: PositiveInt | None = None
    """Latest positive interactions kept of each user, where that is more than features look at; queries with
    an ``at`` in the past reach back so far."""
    attributes: dict[str, AttributeConfig] = {}
    """Attributes of items that queries can filter by, by name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.factory is not None and self.kind != "auto":
            raise ValueError(
                f"index.kind ({self.kind}) and index.factory ({self.factory}) both say what the index is; "
                "leave one out"
            )
        return self


LIST_COLUMNS = ("query_id", "user_id", "strategy", "rank", "item_id", "score")
"""Columns of recommendations, which no column of items can take the names of."""


class RecommendConfig(Section):
    """Offline top k for every user, or for a file of queries."""

    k: PositiveInt = 100
    """Items for each user or query, and the most that a query may ask for."""
    exclude_seen: bool = True
    """Leave out what the user has already had; a query may say otherwise."""
    filter: dict[str, Any] = {}
    """Predicates by attribute that every item must satisfy, as in POST /v1/retrieve."""
    fields: list[str] = []
    """Columns of the item table to write beside each item."""


class LimitsConfig(Section):
    """What one request may ask of a replica, and how much may wait there."""

    max_batch: PositiveInt = 64
    """Requests of one POST /v1/retrieve/batch."""
    max_batch_k: PositiveInt = 10_000
    """Largest sum of k of its requests."""
    max_history: PositiveInt = 10_000
    """Items of a history."""
    max_ids: PositiveInt = 100_000
    """Ids of exclude_items, and of allow_items."""
    max_fields: PositiveInt = 64
    """Item columns of an answer."""
    max_body_bytes: PositiveInt = 1 << 20
    """Bytes of the body of a request; a larger one is answered 413."""
    max_held_bytes: PositiveInt = 32 << 20
    """Bytes of the bodies of all requests that are being read or wait; above it the answer is 503."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds that a client may take to send a body; a slower one is answered 408."""
    max_queued: NonNegativeInt = 64
    """Requests that wait while all workers are busy, each of a batch counted; above it the answer is 503."""
    deadline_ms: PositiveInt = 1_000
    """Milliseconds after which work on a request no longer begins; its X-Deadline-Ms goes before this."""


class ApplicationConfig(Section):
    """The service, wherever it listens: what ``serve.app:build`` takes beside the store."""

    topology: Literal["fused", "sharded"] = "fused"
    """fused: every replica holds all shards; sharded: gateways ask groups of shards elsewhere."""
    groups: PositiveInt = 2
    """Sharded: groups that the shards of a generation are divided among."""
    replicas_per_group: PositiveInt = 1
    """Sharded: replicas of each group; with two, a slow or dead one costs little."""
    group_deadline_ms: Annotated[float, Field(gt=0)] = 200.0
    """Sharded: milliseconds a query after which a group is left out of an answer, which then says so."""
    num_replicas: PositiveInt = 1
    """Replicas of the fused deployment, or of the gateway; the fewest with ``max_replicas``."""
    max_replicas: PositiveInt | None = None
    """Most replicas; Serve adds and takes away replicas by load where this is given."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 2.0
    """Requests at work in each replica that Serve aims at, with ``max_replicas``."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 0.25
    """Logical CPUs that Ray reserves for a replica."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for a replica."""
    threads: PositiveInt = 1
    """CPU threads of the query tower and of a search."""
    workers: PositiveInt = 2
    """Requests that threads of a replica work on at the same time; others wait."""
    inline_ms: Annotated[float, Field(ge=0)] = 2.0
    """Queries that usually take at most this number of milliseconds are answered in the event loop, one after
    the other, without a change of threads; 0 has threads answer all."""
    max_k: PositiveInt = 1_000
    """Largest k of a request."""
    poll_s: Annotated[float, Field(ge=0)] = 1.0
    """Seconds between two looks at the pointer, whose new generation answers without a restart; 0 never."""
    limits: LimitsConfig = LimitsConfig()
    """Further limits of requests, and of what waits."""
    token_file: str | None = None
    """File with the bearer token that requests must bring; readable on every node. Null asks for none."""
    log_user_ids: bool = False
    """Whether the log of a failure holds its message, which may name users and items."""
    demo: bool = True
    """Answer the demo page at / and what it asks for. It shows any user's history, which is personal data, to
    whoever reaches the service: turn it off where that is not wanted."""
    batch_window_ms: Annotated[float, Field(ge=0, le=1)] | None = None
    """Milliseconds for which a query waits for others, to be answered together; when not given 1 with a GPU,
    0 without."""
    probe_every: NonNegativeInt = 1_000
    """One in this number of answers is compared with exact search, for the metric of index recall; 0:
    none."""
    access_log: bool = False
    """Write a log line for each request."""

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) must be at least num_replicas ({self.num_replicas})"
            )
        return self


class ServeConfig(ApplicationConfig):
    """The HTTP service."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""


class ClusterConfig(Section):
    """What each kind of Ray worker reserves."""

    local_num_cpus: PositiveInt = 4
    """Logical CPUs of the Ray that a job starts where there is no cluster."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """GPUs for training, encoding and building: auto takes them where the cluster has them."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs of a training worker."""
    num_encoders: PositiveInt = 2
    """Workers that encode the catalogue, rank users or recommend."""
    cpus_per_encoder: Annotated[float, Field(gt=0)] = 0.5
    """Logical CPUs of such a worker."""
    encode_batch_size: PositiveInt = 8_192
    """Rows that an actor takes at once."""
    cpus_per_reader: Annotated[float, Field(gt=0)] = 0.25
    """Logical CPUs of a task that reads files."""

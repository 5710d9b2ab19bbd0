"""The Serve application: ``serve run serve.app:build store=/data/runs/movielens/store``.

With HAProxy on, Ray's own ``serve run MODULE:BUILDER`` listens on all interfaces. ``serve/config.yaml`` and
``python -m jobs.serve`` name the loopback address.
"""

# No postponed annotations: Ray reads the type of build's argument from the annotation as it stands.
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray.serve import Application
from ray.serve.schema import LoggingConfig


class BuildArgs(BaseModel):
    """Arguments of the application, from a command line or from ``serve/config.yaml``."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    store: str
    """Path of the store, the same on every node, or its URL; its pointer names what is served."""
    cache: str | None = None
    """Folder of each node for the generations of a URL."""
    pointer: str = "CURRENT"
    """Pointer of the store to serve."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of the query tower and of a search."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Requests that a replica works on at the same time; others wait."""
    max_k: Annotated[int, Field(ge=1)] = 1000
    """Largest k of a request."""
    topology: Literal["fused", "sharded"] = "fused"
    """fused: every replica holds all shards; sharded: gateways ask groups of shards elsewhere."""
    groups: Annotated[int, Field(ge=1)] = 2
    """Sharded: groups that the shards of a generation are divided among."""
    replicas_per_group: Annotated[int, Field(ge=1)] = 1
    """Sharded: replicas of each group; with two a slow or dead one costs little."""
    group_deadline_ms: Annotated[float, Field(gt=0)] = 200.0
    """Sharded: milliseconds after which a group is left out of an answer, which then says so."""
    num_replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas of the fused deployment, or of the gateway; the fewest with ``max_replicas``."""
    max_replicas: Annotated[int, Field(ge=1)] | None = None
    """Most replicas; Serve adds and takes away replicas by load where this is given."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 2.0
    """Requests at work in each replica that Serve aims at, with ``max_replicas``."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 0.25
    """Logical CPUs that Ray reserves for a replica."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for a replica."""
    batch_window_ms: Annotated[float, Field(ge=0, le=1)] | None = None
    """Milliseconds for which a query waits for others, to be answered together; when not given 1 with a GPU,
    0 without."""
    probe_every: Annotated[int, Field(ge=0)] = 1_000
    """Of so many answers one is compared with exact search, for the metric of index recall; 0: none."""
    access_log: bool = False
    """Write a log line for each request."""

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) must be at least num_replicas ({self.num_replicas})"
            )
        return self


def build(args: BuildArgs) -> Application:
    """Return the application in the topology that is asked for."""
    return _sharded(args) if args.topology == "sharded" else _fused(args)


def _fused(args: BuildArgs) -> Application:
    from serve import deployments

    # Ray's decorators have no types: to a type checker this is still the class.
    retrieval: Any = deployments.Retrieval
    deployment = retrieval.options(**_ingress_options(args))
    application: Application = deployment.bind(
        _place(args.store),
        args.pointer,
        args.threads,
        args.workers,
        args.max_k,
        _folder(args.cache),
        probe_every=args.probe_every,
        batch_window_ms=args.batch_window_ms,
    )
    return application


def _sharded(args: BuildArgs) -> Application:
    from serve import sharded

    shard_replica: Any = sharded.ShardReplica
    gateway: Any = sharded.Gateway
    options = _actor_options(args)
    place, cache = _place(args.store), _folder(args.cache)
    groups = [
        [
            shard_replica.options(
                name=f"Group-{group}-{replica}", ray_actor_options=options, logging_config=_logging(args)
            ).bind(place, args.pointer, group, args.groups, args.threads, args.workers, cache)
            for replica in range(args.replicas_per_group)
        ]
        for group in range(args.groups)
    ]
    deployment = gateway.options(**_ingress_options(args))
    application: Application = deployment.bind(
        place,
        args.pointer,
        args.threads,
        args.workers,
        args.max_k,
        cache,
        args.group_deadline_ms,
        groups,
    )
    return application


def _ingress_options(args: BuildArgs) -> dict[str, Any]:
    replicas: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas is not None:
        scaling = {
            "min_replicas": args.num_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_ongoing_requests,
        }
        replicas = {"autoscaling_config": scaling}
    return {**replicas, "ray_actor_options": _actor_options(args), "logging_config": _logging(args)}


def _logging(args: BuildArgs) -> LoggingConfig:
    # Serve's access log has the level INFO. Our own events are written at any level.
    level = "INFO" if args.access_log else "WARNING"
    return LoggingConfig(encoding="JSON", log_level=level, enable_access_log=args.access_log)


def _actor_options(args: BuildArgs) -> dict[str, Any]:
    # OpenMP reads its variables when it is loaded, before any code of ours runs in the replica.
    variables = {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return {
        "num_cpus": args.cpus_per_replica,
        "num_gpus": args.gpus_per_replica,
        "runtime_env": {"env_vars": variables},
    }


def _place(store: str) -> str:
    return store if "://" in store else _absolute(store)


def _folder(cache: str | None) -> str | None:
    return None if cache is None else _absolute(cache)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())

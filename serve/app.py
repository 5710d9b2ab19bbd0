"""The Serve application: ``serve run serve.app:build store=/data/runs/movielens/store``.

With HAProxy on, Ray's own ``serve run MODULE:BUILDER`` listens on all interfaces. ``serve/config.yaml`` and
``python -m jobs.serve`` name the loopback address.
"""

# No postponed annotations: Ray reads the type of build's argument from the annotation as it stands.
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application


class BuildArgs(BaseModel):
    """Arguments of the application, from a command line or from ``serve/config.yaml``."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    store: str
    """Path of the store, the same on every node, or its URL; its pointer names what is served."""
    cache: str | None = None
    """Folder of each node for the generations of a URL."""
    pointer: str = "CURRENT"
    """Pointer of the store to serve."""
    poll_s: Annotated[float, Field(ge=0)] = 1.0
    """Seconds between two looks at the pointer, whose new generation answers without a restart; 0 never."""
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
    """Replicas of the fused deployment, or of the gateway."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 0.25
    """Logical CPUs that Ray reserves for a replica."""


def build(args: BuildArgs) -> Application:
    """Return the application in the topology that is asked for."""
    return _sharded(args) if args.topology == "sharded" else _fused(args)


def _fused(args: BuildArgs) -> Application:
    from serve import deployments

    # Ray's decorators have no types: to a type checker this is still the class.
    retrieval: Any = deployments.Retrieval
    deployment = retrieval.options(num_replicas=args.num_replicas, ray_actor_options=_actor_options(args))
    application: Application = deployment.bind(
        _place(args.store),
        args.pointer,
        args.threads,
        args.workers,
        args.max_k,
        _folder(args.cache),
        args.poll_s,
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
            shard_replica.options(name=f"Group-{group}-{replica}", ray_actor_options=options).bind(
                place, args.pointer, group, args.groups, args.threads, args.workers, cache
            )
            for replica in range(args.replicas_per_group)
        ]
        for group in range(args.groups)
    ]
    deployment = gateway.options(num_replicas=args.num_replicas, ray_actor_options=options)
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


def _actor_options(args: BuildArgs) -> dict[str, Any]:
    # OpenMP reads its variables when it is loaded, before any code of ours runs in the replica.
    variables = {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return {"num_cpus": args.cpus_per_replica, "runtime_env": {"env_vars": variables}}


def _place(store: str) -> str:
    return store if "://" in store else _absolute(store)


def _folder(cache: str | None) -> str | None:
    return None if cache is None else _absolute(cache)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())

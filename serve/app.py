"""The Serve application: ``serve run serve.app:build store=/data/runs/movielens/store``.

With HAProxy on, Ray's own ``serve run MODULE:BUILDER`` listens on all interfaces. ``serve/config.yaml`` and
``python -m jobs.serve`` name the loopback address.
"""

# No postponed annotations: Ray reads the type of build's argument from the annotation as it stands.
from pathlib import Path
from typing import Annotated, Any

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
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of the query tower and of a search."""
    workers: Annotated[int, Field(ge=1)] = 2
    """Requests that a replica works on at the same time; others wait."""
    max_k: Annotated[int, Field(ge=1)] = 1000
    """Largest k of a request."""
    num_replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas of the fused deployment."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 0.25
    """Logical CPUs that Ray reserves for a replica."""


def build(args: BuildArgs) -> Application:
    """Return the application in the fused topology."""
    from serve import deployments

    # OpenMP reads its variables when it is loaded, before any code of ours runs in the replica.
    variables = {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    # Ray's decorators have no types: to a type checker this is still the class.
    retrieval: Any = deployments.Retrieval
    deployment = retrieval.options(
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.cpus_per_replica, "runtime_env": {"env_vars": variables}},
    )
    application: Application = deployment.bind(
        args.store if "://" in args.store else _absolute(args.store),
        args.pointer,
        args.threads,
        args.workers,
        args.max_k,
        None if args.cache is None else _absolute(args.cache),
    )
    return application


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())

"""The Serve application: ``serve run serve.app:build store=/data/runs/movielens/store``.

With HAProxy on, Ray's own ``serve run MODULE:BUILDER`` listens on all interfaces. ``serve/config.yaml`` and
``python -m jobs.serve`` name the loopback address.
"""

# No postponed annotations: Ray reads the type of build's argument from the annotation as it stands.
from typing import Any

from ray.serve import Application
from ray.serve.schema import LoggingConfig

from serve.arguments import BuildArgs

__all__ = ["BuildArgs", "build", "sharded"]


def build(args: BuildArgs) -> Application:
    """Return the application in the topology that is asked for."""
    return sharded(args) if args.topology == "sharded" else _fused(args)


def _fused(args: BuildArgs) -> Application:
    from serve import deployments

    # Ray's decorators have no types: to a type checker this is still the class.
    retrieval: Any = deployments.Retrieval
    application: Application = retrieval.options(**_ingress_options(args)).bind(args.resolved())
    return application


def sharded(args: BuildArgs, shard_replica: Any = None) -> Application:
    """Return the application in the sharded topology.

    Args:
        args: of the application.
        shard_replica: deployment of a replica of a group; the service's own when not given.
    """
    from serve.group import ShardReplica
    from serve.sharded import Gateway

    shard_replica = shard_replica or ShardReplica
    gateway: Any = Gateway
    options = {"ray_actor_options": _actor_options(args), "logging_config": _logging(args)}
    groups = [
        [
            shard_replica.options(name=f"Group-{group}-{replica}", **options).bind(args.resolved(), group)
            for replica in range(args.replicas_per_group)
        ]
        for group in range(args.groups)
    ]
    application: Application = gateway.options(**_ingress_options(args)).bind(args.resolved(), groups)
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

"""Ray for a job: join the cluster that is there, or start one on this machine and stop it again."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import ray

from twotower.config import Config
from twotower.errors import ConfigError
from twotower.progress import say

_OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local Ray: no vectors travel through it, only tables of features in blocks."""


@contextlib.contextmanager
def session(config: Config) -> Iterator[None]:
    """Have Ray inside the block; what the block started is stopped at its end."""
    started = connect(config)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def connect(config: Config) -> bool:
    """Join the cluster of RAY_ADDRESS or the one running on this machine, else start Ray here.

    Returns:
        whether this call initialised Ray, so that its caller has to shut it down.

    Raises:
        ConfigError: RAY_ADDRESS names a cluster that does not answer.
    """
    if ray.is_initialized():
        return False
    quiet()
    address = _address()
    if address != "local":
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers at {address!r} ({error}); start it, or unset RAY_ADDRESS"
            ) from None
        say(f"Ray: joined the cluster at {address}")
        return True
    cpus = config.cluster.local_num_cpus
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    say(f"Ray: started on this machine with {cpus} logical CPUs")
    return True


def would_start() -> bool:
    """Return whether ``connect`` would start Ray here: neither connected yet, nor a cluster to join."""
    return not ray.is_initialized() and _address() == "local"


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or _running_cluster() or "local"


def _running_cluster() -> str | None:
    """Return the address of the cluster that ``ray start`` last started on this machine, if it still answers.

    Ray's own "auto" would also take any other Ray process of the machine, such as a test's.
    """
    path = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError, ValueError):
        address = path.read_text().strip()
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=2):
            return address
    return None


def has_gpus() -> bool:
    """Return whether the cluster has a GPU."""
    return bool(ray.cluster_resources().get("GPU", 0))


def wants_gpu(config: Config) -> bool:
    """Return whether this configuration uses GPUs on this cluster.

    Raises:
        ConfigError: GPUs are required and the cluster has none.
    """
    choice = config.cluster.use_gpu
    if choice == "yes" and not has_gpus():
        raise ConfigError("cluster.use_gpu is yes and the cluster has no GPU; add a GPU node or use auto")
    return choice != "no" and has_gpus()


def quiet() -> None:
    """Keep Ray's log lines and warnings off the screen; errors still raise, and its log files have all."""
    for name in ("ray", "ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray\..*")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

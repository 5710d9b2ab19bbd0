"""Ray for a job: join the cluster that is there, or start one on this machine and stop it again."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import ray

from twotower.cluster.place import check_folder, folder, knock, running_cluster
from twotower.config import Config
from twotower.errors import ConfigError, SystemFaultError
from twotower.progress import say

_OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local Ray: no vectors travel through it, only tables of features in blocks."""


@contextlib.contextmanager
def session(config: Config, address: str | None = None) -> Iterator[None]:
    """Have Ray inside the block; what the block started is stopped at its end. See ``connect``."""
    started = connect(config, address)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def connect(config: Config, address: str | None = None) -> bool:
    """Join the cluster of RAY_ADDRESS or the one running on this machine, else start Ray here.

    Args:
        config: for a Ray that is started here.
        address: of a cluster to be joined, or "local" to start Ray here; as above when it is not given, or
            "auto". A Ray that this process is connected to already is used in any case.

    Returns:
        whether this call initialised Ray, so that its caller has to shut it down.

    Raises:
        ConfigError: the address is of a cluster that does not answer, or RAY_TMPDIR no usable folder.
        SystemFaultError: Ray did not start, twice.
    """
    if ray.is_initialized():
        return False
    quiet()
    remedy = "give HOST:PORT of its head, start it, or give no address"
    if address is None or address == "auto":
        address, remedy = _address(), "give HOST:PORT of its head, start it, or unset RAY_ADDRESS"
    if address != "local":
        _join(address, remedy)
        say(f"Ray: joined the cluster at {address}")
        return True
    cpus = config.cluster.local_num_cpus
    try:
        _start(cpus)
    except ConfigError:
        raise
    except Exception as error:
        # A machine under load may be too slow for Ray's own limits of time, once.
        reason = _reason(error)
        say(f"Ray did not start ({reason}); trying once more")
        try:
            _start(cpus)
        except Exception as again:
            raise SystemFaultError(
                f"Ray did not start ({_reason(again)}); free memory and processors and run it again, or look "
                f"at {folder() / 'ray' / 'session_latest' / 'logs'}"
            ) from again
    say(f"Ray: started on this machine with {cpus} logical CPUs")
    return True


def _join(address: str, remedy: str) -> None:
    try:
        knock(address)
        with _without_words():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        _end()
        raise ConfigError(f"no Ray cluster answers at {address!r} ({_reason(error)}); {remedy}") from error


def _start(cpus: int) -> None:
    """Start Ray here.

    Raises:
        ConfigError: its folder for temporary files can not be used.
        Exception: whatever Ray says when it does not start.
    """
    check_folder()
    # Nobody takes this machine away from under a training; what would watch for it is a process of its own.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        with _without_words(), apart():
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except BaseException:
        _end()
        raise


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Let the processes that Ray starts here be no part of this one's process group.

    What a terminal's Ctrl-C or ``timeout`` sends to the whole group would otherwise end Ray before the job
    could stop what it does. They still end with this process. Ray has no setting for that.
    """
    services: Any = importlib.import_module("ray._private.services")
    plain = services.ConsolePopen
    services.ConsolePopen = functools.partial(plain, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = plain


@contextlib.contextmanager
def _without_words() -> Iterator[None]:
    """Keep what Ray logs of its own failure from the screen: it is in the error as well."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _end() -> None:
    """End what there is of a Ray that did not start."""
    with contextlib.suppress(Exception):
        ray.shutdown()


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def would_start() -> bool:
    """Return whether ``connect`` would start Ray here: neither connected yet, nor a cluster to join."""
    return not ray.is_initialized() and _address() == "local"


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or running_cluster() or "local"


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

"""Serve the published generation of a configuration on this machine, and leave nothing behind.

    python -m serve.local --config configs/generated.yaml [--set serve.port=8001]

This is ``make serve``. It joins a running Ray cluster or starts Ray, runs ``serve.app:build`` behind
HAProxy, waits for Ctrl-C or SIGTERM, and then stops everything that it started.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from serve.processes import (
    alive,
    children,
    end_haproxy,
    free_port,
    port_is_free,
    start_guard,
    wait_until_free,
)
from twotower import progress
from twotower.cluster.environment import apply_environment
from twotower.config import Config, load_config
from twotower.errors import ArtefactError, ConfigError, TwotowerError

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = "twotower"
_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.05

# Ports that Serve opens beside its HTTP port, by the variable that moves each. Moved only where taken.
_SIDE_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}


@contextlib.contextmanager
def running(config: Config, pointer: str = "CURRENT") -> Iterator[str]:
    """Serve a generation while the block runs; yields the base URL once ``/readyz`` answers 200.

    Raises:
        ArtefactError: nothing is published, or what is published is damaged.
        ConfigError: the port is taken, or this cluster serves twotower already.
    """
    apply_environment()
    check_published(config, pointer)

    def make() -> Application:
        from serve.app import BuildArgs, build

        serve = config.serve
        return build(
            BuildArgs(
                store=str(config.store.absolute()),
                pointer=pointer,
                threads=serve.threads,
                max_k=serve.max_k,
                num_replicas=serve.num_replicas,
                cpus_per_replica=serve.cpus_per_replica,
            )
        )

    with serving(make, config) as url:
        yield url


def check_published(config: Config, pointer: str = "CURRENT") -> str:
    """Return the id of the generation that a pointer names, after checking every byte of it.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    from twotower.retrieval.generation import Generation
    from twotower.retrieval.store import Store

    store = Store(config.store)
    generation_id = store.current(pointer)
    if generation_id is None:
        raise ArtefactError(
            f"nothing is published: {config.store} has no pointer {pointer}. Run `python -m jobs.pipeline` with "
            "the same --config and --set first, or name the configuration that was run"
        )
    Generation.open(store.path(generation_id), verify=True)
    return str(generation_id)


@contextlib.contextmanager
def serving(make: Callable[[], Application], config: Config) -> Iterator[str]:
    """Run an application on Ray Serve while the block runs; yields the base URL once ``/readyz`` answers 200.

    Ray is used if this process is connected to it, else joined if it runs, else started. Only what was
    started here is stopped afterwards.

    Args:
        make: makes the application; called when Ray is there.
        config: its ``serve`` section says where to listen.
    """
    apply_environment()
    host, port = config.serve.host, config.serve.port
    with _ray(config) as started_ray, _serve(make, host, port, started_ray):
        url = f"http://{_url_host(host)}:{port}"
        _wait_until_ready(url + "/readyz")
        yield url


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[bool]:
    """Connect to Ray; yields whether it was started here."""
    from twotower.cluster.session import session

    before = set(children(os.getpid()))
    started: list[int] = []
    try:
        with session(config):
            started = sorted(set(children(os.getpid())) - before)
            yield bool(started)
    finally:
        _wait_until_gone(started)


@contextlib.contextmanager
def _serve(make: Callable[[], Application], host: str, port: int, started_ray: bool) -> Iterator[None]:
    import ray
    from ray import serve

    # Importing serve sets its logger to INFO. Its log files keep everything.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    client = _existing_client()
    ports = {}
    if client is None:
        if not port_is_free(host, port):
            raise ConfigError(
                f"port {port} on {host} is taken; stop what listens there, or choose another with --set serve.port="
            )
        ports = {name: free_port(default) for name, default in _SIDE_PORTS.items()}
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
            controller_options={"runtime_env": {"env_vars": {n: str(p) for n, p in ports.items()}}},
        )
    else:
        _check_existing(client, host, port)
    node_ids = [node["NodeID"] for node in ray.nodes()]
    guard = start_guard(node_ids) if started_ray else None
    try:
        try:
            serve.run(make(), name=APP_NAME, route_prefix="/")
        except RuntimeError as error:
            raise _explained(error) from None
        yield
    finally:
        if client is None:
            _shut_down_serve(node_ids)
        else:
            with contextlib.suppress(Exception):
                serve.delete(APP_NAME)
        if guard is not None and guard.stdin is not None:
            guard.stdin.close()
            guard.wait()
        held = [] if client else wait_until_free([(host, port), *(("", p) for p in ports.values())], _STOP_TIMEOUT_S)
        if held:
            progress.say(f"warning: after stopping, something still listens on ports {held}")


def _existing_client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _check_existing(client: Any, host: str, port: int) -> None:
    from ray import serve

    options = client.http_config
    if (options.host, options.port) != (host, port):
        raise ConfigError(
            f"this Ray cluster runs Serve on {options.host}:{options.port} already, and that can not change while it "
            f"runs; use --set serve.port={options.port} serve.host={options.host}, or end it with `serve shutdown -y`"
        )
    if APP_NAME in serve.status().applications:
        raise ConfigError(
            f"this Ray cluster serves the application {APP_NAME!r} already on {host}:{port}; end that one first "
            "(`serve shutdown -y`)"
        )


def _shut_down_serve(node_ids: list[str]) -> None:
    import ray
    from ray import serve

    try:
        client = _existing_client()
        if client is not None:
            # serve.shutdown() alone waits inside a call that dies with the controller, and Ray reports that
            # death as an error on the terminal.
            ray.get(client._controller.graceful_shutdown.remote(wait=False))
        _wait_until_serve_is_gone()
        serve.shutdown()
    except Exception as error:
        # Whatever is left is ended below and, where Ray was started here, with Ray.
        progress.say(f"warning: Serve did not stop cleanly ({type(error).__name__})")
    finally:
        if ray.is_initialized():
            end_haproxy(node_ids)


def _wait_until_serve_is_gone() -> None:
    """Wait until the cluster lists no living actor of Serve."""
    from ray.util import list_named_actors

    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        if not any(actor["namespace"] == "serve" for actor in list_named_actors(all_namespaces=True)):
            return
        time.sleep(_POLL_S)


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _explained(error: RuntimeError) -> TwotowerError:
    """Return an error that holds the last line of a replica's stack trace, which is the reason."""
    reasons = [line.strip() for line in str(error).splitlines() if "twotower.errors." in line]
    if reasons:
        return ArtefactError(reasons[-1].partition(": ")[2])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return TwotowerError(f"the service did not start: {lines[-1] if lines else error}")


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    reason: object = "no answer"
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}"
        except (urllib.error.URLError, OSError) as error:
            reason = error
        time.sleep(_POLL_S)
    raise TwotowerError(f"the service is not ready after {_READY_TIMEOUT_S:.0f} s: {url} gave {reason}")


def _url_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class _Stop(BaseException):
    """A signal asked for the end."""


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[Callable[[], None]]:
    """End the block, with its clean-up, at the first SIGINT, SIGTERM or SIGHUP; yields a function that waits for it.

    Later signals change nothing: an interrupted clean-up would leave processes behind.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if not stopping.is_set():
            stopping.set()
            raise _Stop

    def install() -> None:
        for number in numbers:
            signal.signal(number, stop)

    def wait() -> NoReturn:
        # Ray installs a SIGTERM handler of its own when it starts.
        install()
        while True:
            signal.pause()

    before = {number: signal.getsignal(number) for number in numbers}
    install()
    try:
        yield wait
    except _Stop:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m serve.local", description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file of the scenario")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a value")
    parser.add_argument("--pointer", default="CURRENT", help="pointer of the store to serve")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        with _stopped_by_signals() as wait:
            progress.stage(f"serve {config.name}")
            with running(config, options.pointer) as url:
                _announce(url)
                wait()
    except TwotowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    progress.say("stopped")
    return 0


def _announce(url: str) -> None:
    body = json.dumps({"user_id": "1", "k": 5})
    progress.say(f"ready: {url} (try {url}/docs)")
    progress.say(f"curl -s {url}/v1/retrieve -H 'Content-Type: application/json' -d '{body}'")
    progress.say("Ctrl-C stops it")


if __name__ == "__main__":
    sys.exit(main())

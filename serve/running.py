"""The service on this machine: start it on Ray, wait until it is ready, and leave nothing behind.

It joins a running Ray cluster or starts Ray, runs ``serve.app:build`` behind HAProxy, and stops what it
started when the block ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from serve.checks import SIDE_PORTS, check_port, check_published, check_token, side_port
from twotower import progress
from twotower.cluster import haproxy
from twotower.cluster.processes import (
    Guard,
    descendants,
    end_haproxy,
    wait_until_free,
)
from twotower.config import Config
from twotower.environment import apply_environment
from twotower.errors import ArtefactError, ConfigError, SystemFaultError, TwotowerError

if TYPE_CHECKING:
    from ray.serve import Application

APP_NAME = "twotower"
_READY_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.05


@contextlib.contextmanager
def running(
    config: Config, pointer: str = "CURRENT", connected: Callable[[], None] | None = None
) -> Iterator[str]:
    """Serve a generation while the block runs; yields the base URL once ``/readyz`` answers 200.

    Args:
        config: names the store and where to listen.
        pointer: pointer of the store.
        connected: called once Ray is there.

    Raises:
        ArtefactError: nothing is published, or what is published is damaged.
        ConfigError: the port is taken, this cluster serves twotower already, or a file holds no token.
    """
    apply_environment()
    check_token(config)
    check_published(config, pointer)

    def make() -> Application:
        from serve.app import BuildArgs, build

        return build(
            BuildArgs(
                store=config.storage.store or str(config.store),
                cache=str(config.store),
                pointer=pointer,
                **config.serve.model_dump(exclude={"host", "port"}),
            )
        )

    with serving(make, config, connected) as url:
        yield url


@contextlib.contextmanager
def serving(
    make: Callable[[], Application], config: Config, connected: Callable[[], None] | None = None
) -> Iterator[str]:
    """Run an application on Ray Serve while the block runs; yields the base URL once ``/readyz`` answers 200.

    Ray is used if this process is connected to it, else joined if it runs, else started. Only what was
    started here is stopped afterwards.

    Args:
        make: makes the application; called when Ray is there.
        config: its ``serve`` section says where to listen.
        connected: called once Ray is there.
    """
    apply_environment()
    from twotower.cluster.session import would_start

    host, port = config.serve.host, config.serve.port
    if would_start():
        # No Serve to join can be what listens there, so the seconds of Ray's start are saved.
        check_port(host, port)
    opened: list[tuple[str, int]] = []
    try:
        with _ray(config) as ray_runs:
            if connected is not None:
                connected()
            with _serve(make, config, ray_runs, opened):
                url = f"http://{_url_host(host)}:{port}"
                _wait_until_ready(url + "/readyz")
                yield url
    finally:
        if held := wait_until_free(opened, _STOP_TIMEOUT_S):
            progress.say(f"warning: after stopping, something still listens on ports {held}")


@contextlib.contextmanager
def _ray(config: Config) -> Iterator[Callable[[], bool]]:
    """Connect to Ray; yields a function that says whether what was started here still runs."""
    import ray

    from twotower.cluster.session import session

    if ray.is_initialized():
        yield lambda: True
        return
    before = descendants(os.getpid())
    guard = Guard()
    connected = threading.Event()

    def watch() -> None:
        # A signal in the middle of Ray's start ends this process at once, with half of Ray running.
        while not connected.wait(_POLL_S):
            guard.add_processes(descendants(os.getpid()) - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with session(config):
            connected.set()
            watcher.join()
            started = descendants(os.getpid()) - before - {guard.process}
            guard.add_processes(started)
            if started:
                guard.add_nodes(node["NodeID"] for node in ray.nodes())
            yield lambda: all(process.alive for process in started)
    finally:
        connected.set()
        watcher.join()
        guard.close()


@contextlib.contextmanager
def _serve(
    make: Callable[[], Application],
    config: Config,
    ray_runs: Callable[[], bool],
    opened: list[tuple[str, int]],
) -> Iterator[None]:
    """Run an application on Serve, which is started if need be, and take away again what was added.

    Args:
        make: makes the application.
        config: its ``serve`` section says where to listen.
        ray_runs: whether Ray still runs at the end.
        opened: gets the addresses that were opened here.
    """
    import ray
    from ray import serve

    host, port = config.serve.host, config.serve.port
    # Importing serve sets its logger to INFO. Its log files keep everything.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    client = _existing_client()
    if client is not None:
        _check_existing(client, host, port)
        try:
            _run(make())
            yield
        finally:
            with contextlib.suppress(Exception):
                serve.delete(APP_NAME)
        return
    check_port(host, port)
    ports = {name: side_port(name) for name in SIDE_PORTS}
    opened += [(host, port), *(("", number) for number in ports.values())]
    node_ids = [node["NodeID"] for node in ray.nodes()]
    variables = {name: str(number) for name, number in ports.items()}
    if not os.environ.get(haproxy.VARIABLE) and _is_on_head():
        config.storage.path.mkdir(parents=True, exist_ok=True)
        variables[haproxy.VARIABLE] = str(haproxy.write_program(config.storage.path / ".haproxy"))
    try:
        _start_proxy(host, port, variables)
        _run(make())
        yield
    finally:
        if ray_runs():
            _shut_down_serve()
        end_haproxy(node_ids)


def _start_proxy(host: str, port: int, variables: dict[str, str]) -> None:
    """Start Serve and its proxy; a machine under load may be too slow for Serve's own limit of time, once.

    Raises:
        SystemFaultError: it did not start, twice.
    """
    from ray import serve

    for again in (False, True):
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
                controller_options={"runtime_env": {"env_vars": variables}},
            )
            return
        except TimeoutError as error:
            if again:
                raise SystemFaultError(
                    f"the service did not start ({error}); free processors and memory, and run it again"
                ) from error
            progress.say(f"the service did not start ({error}); trying once more")
            _shut_down_serve()


def _is_on_head() -> bool:
    """Return whether Ray's head node, where HAProxy runs, is this machine."""
    import ray

    here = ray.util.get_node_ip_address()
    return any(
        node["NodeManagerAddress"] == here
        for node in ray.nodes()
        if node["Alive"] and "node:__internal_head__" in node["Resources"]
    )


def _run(application: Application) -> None:
    from ray import serve

    try:
        serve.run(application, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise _explained(error) from None


def _existing_client() -> Any:
    """Return the client of the Serve that runs on this cluster, or None. Ray has no public way to ask."""
    from ray.serve import context

    return context._get_global_client(raise_if_no_controller_running=False)


def _check_existing(client: Any, host: str, port: int) -> None:
    from ray import serve

    options = client.http_config
    if (options.host, options.port) != (host, port):
        raise ConfigError(
            f"this Ray cluster runs Serve on {options.host}:{options.port} already, and that can not change "
            f"while it runs; use --set serve.port={options.port} serve.host={options.host}, or end it with "
            "`serve shutdown -y`"
        )
    if APP_NAME in serve.status().applications:
        raise ConfigError(
            f"this Ray cluster serves the application {APP_NAME!r} already on {host}:{port}; end that one "
            "first (`serve shutdown -y`)"
        )


def _shut_down_serve() -> None:
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
        # Whatever is left ends with Ray where Ray was started here.
        progress.say(f"warning: Serve did not stop cleanly ({type(error).__name__})")


def _wait_until_serve_is_gone() -> None:
    """Wait until the cluster lists no living actor of Serve."""
    from ray.util import list_named_actors

    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        if not any(actor["namespace"] == "serve" for actor in list_named_actors(all_namespaces=True)):
            return
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

"""Fixtures shared by all tiers. The folder of a test is its marker: tests/cluster/ has the marker cluster.

Fixtures: ``rng``, ``small_config``, ``small_dataset``, ``ray_local``, ``mirror``, ``update_golden``, and the
published generation ``shop`` with its one real service ``client`` and the same without HTTP ``library``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from tests.browser.chromium import reason_to_skip
from tests.sockets import NoSockets

ROOT = Path(__file__).parents[1]
TIERS = ("unit", "property", "parity", "cluster", "http", "browser", "golden")
OF_LANE = {"cluster": "cluster", "http": "service", "browser": "service"}
"""Folders that one process of pytest-xdist runs one after the other, with its Ray and its service: of
``cluster`` every test wants all CPUs. Of other files any process runs the next."""
OWN_SERVICES = {
    f"tests/http/test_serve_{name}.py" for name in ("hardened", "operations", "redeploy", "sharded", "stop")
}
"""Files that start services of their own: a lane beside the one of the service that all others ask."""
NO_SERVER = {f"tests/http/test_serve_{name}.py" for name in ("limits", "secrets", "workers")}
"""Files of these folders that ask the application without a server, and start no Ray."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Ray and Ray Serve read these when they are imported. Ray 2.60 would otherwise write a token into the
    # home folder, join whatever cluster it finds, and send usage reports.
    os.environ.update(
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        RAY_DATA_DISABLE_PROGRESS_BARS="1",
        # How often Ray Train looks after its workers (seconds): its default of 2 is most of a tiny run.
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
        # Most of what tests do with Ray has variables of its own, for which the workers that Ray starts ahead
        # of the first call are of no use.
        RAY_prestart_worker_first_driver="0",
        # No test takes a node away, so no process need look out for that in each training.
        RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
        # How often processes hand their metrics to the endpoint (milliseconds): its default is 10,000.
        RAY_metrics_report_interval_ms="500",
        # How long Serve waits for its proxies (seconds) before it kills them and starts others: its defaults
        # of 5, 10 and 30 are too short for a machine on which other tests run.
        RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",
        RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S="60",
        RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S="120",
        MPLBACKEND="Agg",
    )
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Child processes and Ray workers import the tests' modules too.
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(ROOT / "tests" / "startup"), str(ROOT), *filter(None, before)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    from twotower.environment import apply_environment

    apply_environment()
    # A shell starts what runs in the background with these ignored, and every child would ignore them too.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    config.pluginmanager.register(_RealDataSummary(), "realdata-summary")
    config.pluginmanager.register(NoSockets(), "no-sockets")
    # A busy machine is no fault of what is tested.
    hypothesis.settings.register_profile(
        "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process run a whole file, with its fixtures, and a whole lane, with its Ray."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return _lane(file) or file

    # In the order of ``_lanes_apart``.
    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _lanes_apart(items)
    browser_missing = reason_to_skip()
    gpu_missing = _gpu_missing() if any(item.get_closest_marker("gpu") for item in items) else None
    for item in items:
        folder = _folder(item)
        if folder in TIERS:
            item.add_marker(folder)
        fixtures = getattr(item, "fixturenames", ())
        if "mirror" in fixtures:
            item.add_marker("realdata")
        if "endpoint" in fixtures:
            item.add_marker("sockets")
        if gpu_missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=gpu_missing))
        if browser_missing and folder == "browser":
            item.add_marker(pytest.mark.skip(reason=browser_missing))


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").parts[0]


def _lane(file: str) -> str | None:
    if file in NO_SERVER:
        return None
    return "own services" if file in OWN_SERVICES else OF_LANE.get(file.split("/")[1])


def _lanes_apart(items: list[pytest.Item]) -> None:
    """Let what runs on Ray begin first, since it takes longest, and services last, so that two of them start
    beside each other and not beside a training."""
    order = ("cluster", None, "own services", "service")

    def place(item: pytest.Item) -> tuple[int, bool]:
        file = item.nodeid.partition("::")[0]
        return order.index(_lane(file)), file.startswith("tests/browser/")

    items.sort(key=place)


def _gpu_missing() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no GPU"


class _RealDataSummary:
    """Says at the end how many tests on real data ran, or why they did not."""

    def __init__(self) -> None:
        self.ran = 0
        self.skipped: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "realdata" not in report.keywords:
            return
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        elif report.when == "call":
            self.ran += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        parts = [f"{self.ran} ran"]
        parts += [f"{count} did not run: {reason}" for reason, count in self.skipped.items()]
        if not self.ran and not self.skipped:
            parts = ["none selected"]
        terminalreporter.write_line(f"real-data tests: {'; '.join(parts)}")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(20_260_101)


@pytest.fixture(scope="session")
def mirror() -> Path:
    """Folder with the official MovieLens zip files; the test is skipped where there is none."""
    value = os.environ.get("TWOTOWER_MIRROR", "")
    if not value:
        pytest.skip("TWOTOWER_MIRROR is not set")
    folder = Path(value)
    if not (folder / "ml-latest-small.zip").is_file():
        pytest.skip(f"TWOTOWER_MIRROR={value} has no ml-latest-small.zip")
    return folder


@pytest.fixture(scope="session")
def small_values() -> Callable[..., dict[str, Any]]:
    """Function of (root, **sections) that returns the plain values of a small configuration."""

    def values(root: Path | str, **sections: Any) -> dict[str, Any]:
        # Widths and counts differ everywhere, so that swapped axes are noticed.
        base: dict[str, Any] = {
            "name": "small",
            "seed": 11,
            "storage": {"root": str(root)},
            "data": {
                "source": {
                    "kind": "generated",
                    "num_users": 300,
                    "num_items": 210,
                    "num_interactions": 7_000,
                    "num_tastes": 6,
                    "seed": 5,
                }
            },
            "features": {
                "query": [
                    {"name": "user_id", "type": "id", "dim": 9},
                    {"name": "history", "type": "history", "dim": 20, "max_length": 13},
                    {"name": "genre_profile", "type": "profile", "of": "genres", "max_length": 17},
                ],
                "item": [
                    {"name": "item_id", "type": "id", "dim": 20},
                    {"name": "genres", "type": "multi_hot", "dim": 7},
                    {"name": "title", "type": "text", "dim": 10, "buckets": 500},
                ],
            },
            "model": {
                "embedding_dim": 24,
                "query_tower": {"hidden": [40], "norm": "layer", "dropout": 0.1},
                "item_tower": {"hidden": [36], "norm": "layer", "dropout": 0.1},
            },
            "train": {
                "epochs": 2,
                "global_batch_size": 256,
                "num_workers": 1,
                "fit": "train",
                "loss": {"temperature": 0.07, "learn_temperature": True},
                "validation": {"metric": "recall"},
            },
            "index": {"num_shards": 3, "recall_k": 20, "num_recall_queries": 30},
            "evaluation": {"ks": [5, 10], "latency_requests": 25, "map_items": 60},
            "recommend": {"k": 8},
            "cluster": {"num_encoders": 1, "encode_batch_size": 64},
        }
        return {**base, **sections}

    return values


@pytest.fixture(scope="session")
def small_config(
    tmp_path_factory: pytest.TempPathFactory, small_values: Callable[..., dict[str, Any]]
) -> Any:
    """A small configuration on generated data, with a root of its own."""
    from twotower.config import parse_config

    return parse_config(small_values(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="session")
def small_dataset(small_config: Any) -> Any:
    """The prepared dataset of ``small_config``; do not change it."""
    from twotower.data.prepare import prepare

    return prepare(small_config)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """One local Ray with four logical CPUs for the whole run; it joins no other cluster."""
    import ray
    from ray._private import parameter

    with pytest.MonkeyPatch.context() as patch:
        # Every Ray wants the same port for its agent and tries for more than three seconds where it is taken.
        # This one takes any other, for the sake of those that tests start beside it. No test waits for the
        # autoscaler's process.
        alone = functools.partial(parameter.RayParams, dashboard_agent_listen_port=0, no_monitor=True)
        patch.setattr(parameter, "RayParams", alone)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        yield
    finally:
        if "ray.serve" in sys.modules:
            from ray import serve

            serve.shutdown()
        ray.shutdown()


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to write the golden files instead of comparing with them."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A published generation, on a free port; do not change it."""
    from tests.service import Shop
    from tests.shop import build_store
    from twotower.cluster.processes import free_port
    from twotower.config import parse_config

    config, dataset, generation = build_store(tmp_path_factory.mktemp("shop"), kept_history=1_000)
    values = config.to_json()
    values["serve"]["port"] = free_port()
    values["serve"]["probe_every"] = 1
    return Shop(parse_config(values), dataset, generation)


@pytest.fixture(scope="session")
def client(shop: Any, ray_local: None) -> Iterator[Any]:
    """A client of the service that runs for the whole run, of the HTTP tests and of the browser."""
    from tests.service import Client
    from twotower.cluster.processes import free_port
    from twotower.cluster.service import SIDE_PORTS, running

    with pytest.MonkeyPatch.context() as patch:
        # The usual ports are left to the services that tests of another process start at the same moment.
        for name in SIDE_PORTS:
            patch.setenv(name, str(free_port()))
        with running(shop.config) as url:
            yield Client(url)


@pytest.fixture(scope="session")
def library(shop: Any) -> Any:
    """The same generation without HTTP."""
    from twotower.retrieval.retriever import Retriever

    return Retriever.open(shop.generation)

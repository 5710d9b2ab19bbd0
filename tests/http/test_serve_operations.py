"""Serving as it is operated: `serve run`, `serve deploy`, changes under load, metrics, logs."""

from __future__ import annotations

import functools
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from serve.app import BuildArgs, build
from serve.metrics import BUCKETS_MS, SPECS
from tests.http.conftest import Client, Shop
from tests.scraping import scrape
from twotower.cluster.processes import Process, descendants, free_port, port_is_free
from twotower.config.service import ServeConfig
from twotower.errors import ConfigError

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240

# A Ray with the dashboard, which `serve deploy` talks to, until its standard input closes. Serve keeps the
# address that it is started with first.
RAY = """
import sys, ray
from ray import serve
context = ray.init(address="local", num_cpus=4, include_dashboard=True, dashboard_port=int(sys.argv[1]),
                   object_store_memory=100_000_000, log_to_driver=False, logging_level="ERROR")
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
print(ray.get_runtime_context().gcs_address, context.address_info["session_dir"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


class Cluster:
    """A Ray of its own with its dashboard, and the commands that are sent to it."""

    def __init__(self, folder: Path) -> None:
        self.printed = folder / "serve.txt"
        self.port, dashboard_port = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        names = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
        ports = {f"RAY_SERVE_{name}": free_port() for name in names}
        self.side_ports = [dashboard_port, *ports.values()]
        self.environment = {**os.environ, **{name: str(port) for name, port in ports.items()}}
        self.environment.pop("RAY_ADDRESS", None)
        with open(self.printed, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RAY, str(dashboard_port), str(self.port)],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        self.started: set[Process] = set()

    def wait_until_started(self) -> None:
        assert self.process.stdout is not None
        words = self.process.stdout.readline().decode().split()
        assert len(words) == 2, self.printed.read_text()
        self.environment["RAY_ADDRESS"] = words[0]
        self.session_dir = Path(words[1])

    def serve(self, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.printed, "ab") as file:
            return subprocess.Popen(
                [sys.executable, str(Path(sys.executable).parent / "serve"), *arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def serve_and_wait(self, *arguments: str) -> None:
        assert self.serve(*arguments).wait(PATIENCE_S) == 0, self.printed.read_text()

    def haproxies(self) -> set[Process]:
        return self._alive("haproxy.cfg")

    def replicas(self) -> set[Process]:
        return self._alive("Retrieval")

    def log_lines(self) -> dict[str, list[dict[str, Any]]]:
        """Return the log lines of each replica there ever was, by the name of the file."""
        files = sorted((self.session_dir / "logs" / "serve").glob("replica_*.log"))
        return {f.name: [json.loads(line) for line in f.read_text().splitlines()] for f in files}

    def close(self) -> None:
        self.started |= descendants(self.process.pid)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)
        self.process.stdout.close()

    def left(self) -> list[str]:
        """Return the command lines that still run some time after the end."""
        deadline = time.monotonic() + PATIENCE_S / 2
        while any(p.alive for p in self.started) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [command_line(p.pid) for p in self.started if p.alive]

    def _alive(self, name: str) -> set[Process]:
        self.started |= descendants(self.process.pid)
        return {p for p in self.started if p.alive and name in command_line(p.pid)}


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        cluster.wait_until_started()
        yield cluster
    finally:
        if cluster.process.poll() is None:
            cluster.close()
        for process in cluster.started:
            if process.alive:
                os.kill(process.pid, signal.SIGKILL)


def wait_until(holds: Callable[[], Any], what: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := holds()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
    return value


def answers(client: Client, max_k: int | None = None) -> bool:
    """Return whether the service answers, with this limit of k where one is given."""
    try:
        if client.get("/readyz").status != 200:
            return False
        refused = client.retrieve(k=10**6)
    except OSError:
        return False
    return max_k is None or f"{max_k}" in refused.json["error"]["allowed"]


class Load:
    """Requests from a few keep-alive connections until it is stopped."""

    def __init__(self, port: int, connections: int = 3) -> None:
        self.statuses: list[int | str] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(port, n)) for n in range(connections)]
        for thread in self._threads:
            thread.start()

    def _run(self, port: int, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not self._end.wait(0.03):
            body = json.dumps({"user_id": str(number), "k": 5})
            try:
                connection.request("POST", "/v1/retrieve", body)
                answer = connection.getresponse()
                answer.read()
                self.statuses.append(answer.status)
            except (OSError, http.client.HTTPException) as error:
                self.statuses.append(repr(error))
                connection.close()
        connection.close()

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


def test_serve_run_and_serve_deploy(shop: Shop, cluster: Cluster, tmp_path: Path) -> None:
    """Both commands serve and leave nothing; two replicas become one, and a new one, without a failure."""
    port, store = cluster.port, str(shop.config.store)
    client = Client(f"http://127.0.0.1:{port}")

    run = cluster.serve("run", "serve.app:build", f"store={store}", "max_k=77", "access_log=true")
    wait_until(lambda: answers(client, 77), cluster.printed.read_text)
    assert len(client.items(user_id="3", k=5)) == 5
    assert cluster.haproxies()
    run.send_signal(signal.SIGINT)
    assert run.wait(PATIENCE_S) == 0
    wait_until(lambda: not cluster.haproxies() and port_is_free("127.0.0.1", port))

    document = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    document["http_options"]["port"] = port
    (application,) = document["applications"]
    (deployment,) = application["deployments"]
    path = tmp_path / "config.yaml"

    def deploy(num_replicas: int, max_k: int) -> None:
        deployment["num_replicas"] = num_replicas
        # A machine on which a replica starts beside other tests may take more than the default second.
        limits = {"deadline_ms": 30_000}
        application["args"] |= {"store": store, "max_k": max_k, "limits": limits}
        path.write_text(yaml.safe_dump(document))
        cluster.serve_and_wait("deploy", str(path), "-a", cluster.dashboard)

    deploy(2, 100)
    wait_until(lambda: answers(client, 100) and len(cluster.replicas()) == 2, cluster.printed.read_text)
    first = cluster.replicas()
    load = Load(port)
    try:
        deploy(1, 100)
        wait_until(lambda: len(cluster.replicas()) == 1)
        assert cluster.replicas() < first
        # The only replica is replaced, and the new one answers before the old one goes.
        deploy(1, 90)
        wait_until(lambda: len(cluster.replicas()) == 1 and not cluster.replicas() & first)
        before = len(load.statuses)
        wait_until(lambda: len(load.statuses) > before + 20)
    finally:
        load.stop()
    assert set(load.statuses) == {200}
    assert len(load.statuses) > 100
    assert answers(client, 90)

    cluster.serve_and_wait("shutdown", "-y", "-a", cluster.dashboard)
    wait_until(lambda: not cluster.haproxies() and port_is_free("127.0.0.1", port))
    lines = cluster.log_lines()
    cluster.close()
    assert cluster.left() == []
    assert [p for p in [port, *cluster.side_ports] if not port_is_free("", p)] == []

    assert len(lines) == 4
    for name, of_one in lines.items():
        events = [line["event"] for line in of_one if "event" in line]
        assert events == ["started", "stopped"], name
        assert {line["generation"] for line in of_one if "event" in line} == {"g1"}
        requests = [line["message"] for line in of_one if "/v1/retrieve" in line["message"]]
        assert bool(requests) == ("default" in name), name
    deployed = [line for name in lines if "twotower" in name for line in lines[name]]
    begun = sorted(line["asctime"] for line in deployed if line.get("event") == "started")
    ended = sorted(line["asctime"] for line in deployed if line.get("event") == "stopped")
    # Else requests would have waited for the new replica, for as long as it takes to load.
    assert begun[2] < ended[1]


COUNTED = ["requests_total", "answers_total", "request_ms_count", "stage_ms_count", "stage_ms_bucket"]


GAUGES = ["index_recall", "generation_info", "data_age_s"]


def counted() -> dict[str, dict[tuple[str, ...], float]]:
    return {name: scrape(f"twotower_{name}") for name in COUNTED}


def test_rays_endpoint_counts_the_requests_that_were_sent(client: Client) -> None:
    # Whatever was sent before has arrived once a marker has.
    marks = scrape("twotower_requests_total").get(("other", "404"), 0.0)
    client.get("/a/marker")
    wait_until(lambda: scrape("twotower_requests_total").get(("other", "404"), 0.0) == marks + 1)
    # Ray drops a gauge that it has not heard of for a moment.
    before = wait_until(lambda: (found := counted())["request_ms_count"] and found)
    for user in range(12):
        assert client.retrieve(user_id=str(user), k=5).status == 200
    for _ in range(3):
        assert client.retrieve(k=5).status == 200
    assert client.retrieve(k=0).status == 422
    assert client.retrieve(k=5, history=["1001"]).status == 200
    assert client.get("/v1/items/1003/similar").status == 200
    assert client.get("/v1/items/none/similar").status == 404

    def added() -> dict[str, dict[tuple[str, ...], float]]:
        after = counted()
        changes = {
            name: {key: value - before[name].get(key, 0) for key, value in of_one.items()}
            for name, of_one in after.items()
        }
        return {name: {k: v for k, v in of_one.items() if v} for name, of_one in changes.items()}

    similar = "/v1/items/{item_id:path}/similar"
    expected = {
        "requests_total": {
            ("/v1/retrieve", "200"): 16,
            ("/v1/retrieve", "422"): 1,
            (similar, "200"): 1,
            (similar, "404"): 1,
        },
        "answers_total": {("personal",): 12, ("popular",): 3, ("history",): 1, ("similar",): 1},
        "request_ms_count": {("/v1/retrieve",): 17, (similar,): 2},
        "stage_ms_count": {("wait",): 18, ("encode",): 17, ("search",): 17, ("total",): 17},
    }
    wait_until(lambda: added()["stage_ms_bucket"].get(("total", "+Inf")) == 17)
    wait_until(
        lambda: {k: v for k, v in added().items() if k != "stage_ms_bucket"} == expected, lambda: str(added())
    )
    bounds = {float(le) for stage, le in scrape("twotower_stage_ms_bucket") if stage == "total"}
    assert bounds == {*BUCKETS_MS, float("inf")}


def test_rays_endpoint_says_what_answers_and_how_well(client: Client) -> None:
    client.items(user_id="3", k=5)
    wait_until(lambda: scrape("twotower_probes_total"))
    # Ray drops gauges between a scrape and their next export.
    values = {name: wait_until(functools.partial(scrape, f"twotower_{name}")) for name in GAUGES}
    # Every shard of the test's generation is exact.
    assert values["index_recall"] == {(): 1.0}
    assert values["generation_info"] == {("g1",): 1.0}
    as_of = client.get("/v1/generation").json["as_of"]
    assert values["data_age_s"][()] == pytest.approx(time.time() - as_of / 1e6, abs=60)
    assert scrape("twotower_swaps_total") == {}


DOCUMENTED = re.findall(
    r"^\| [^|]+ \| `(\{.*\})` \| `(\w+)` \|$", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE
)


def test_the_table_of_cold_starts_is_true(client: Client) -> None:
    assert len(DOCUMENTED) == 7
    for request, strategy in DOCUMENTED:
        reply = client.retrieve(**json.loads(request))
        assert reply.status == 200
        assert (request, reply.json["strategy"]) == (request, strategy)
        assert len(reply.json["items"]) == json.loads(request)["k"]


def test_every_metric_and_argument_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert names >= set(SPECS)
    assert names >= set(BuildArgs.model_fields)


@pytest.mark.parametrize("most", [None, 4])
def test_a_build_scales_as_its_arguments_say(most: int | None) -> None:
    built = build_app(
        build(BuildArgs(store="/nowhere", num_replicas=2, max_replicas=most, target_ongoing_requests=3)),
        name="twotower",
        default_runtime_env={},
    )
    (deployment,) = built.deployments
    config = deployment._deployment_config
    if most is None:
        assert (config.num_replicas, config.autoscaling_config) == (2, None)
        return
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 4, 3)


def test_serve_takes_the_deploy_file_with_autoscaling() -> None:
    document = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    (deployment,) = document["applications"][0]["deployments"]
    del deployment["num_replicas"]
    (comment,) = re.findall(r"# (autoscaling_config: .*)", (ROOT / "serve" / "config.yaml").read_text())
    deployment |= yaml.safe_load(comment)
    (schema,) = ServeDeploySchema.model_validate(document).applications[0].deployments
    assert schema.autoscaling_config["max_replicas"] == 4
    with pytest.raises(ValueError, match="num_replicas"):
        ServeDeploySchema.model_validate(
            {"applications": [{"import_path": "a:b", "deployments": [deployment | {"num_replicas": 1}]}]}
        )


def test_fewer_than_the_fewest_replicas() -> None:
    for make in (ServeConfig, lambda **kw: BuildArgs(store="/s", **kw)):
        with pytest.raises(
            (ValueError, ConfigError), match=r"max_replicas \(1\) must be at least num_replicas \(2\)"
        ):
            make(num_replicas=2, max_replicas=1)

"""Starting and stopping: after the end nothing is left, and what can not start says why."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import serve as serve_job
from tests.service import Shop
from tests.shop import build_store
from twotower.cluster.processes import Process, descendants, free_port, port_is_free

ROOT = Path(__file__).parents[2]
START_S, STOP_S = 300, 180


class Command:
    """A running ``python -m jobs.serve``, with everything that it started."""

    config_path: Path

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.printed = folder / "printed.txt"
        with open(self.printed, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.serve", *arguments],
                cwd=ROOT,
                # It must start a Ray of its own, whatever runs on this machine.
                env={**os.environ, "RAY_ADDRESS": "local", **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started: set[Process] = set()

    def wait_until_ready(self) -> None:
        """Wait until it says that it is ready, and note the processes on the way."""
        deadline = time.monotonic() + START_S
        while "Ctrl-C stops it" not in self.printed.read_text():
            assert self.process.poll() is None, self.printed.read_text()
            assert time.monotonic() < deadline, self.printed.read_text()
            self.look()
            time.sleep(0.1)
        self.look()

    def look(self) -> None:
        """Note the processes that run now."""
        self.started |= descendants(self.process.pid)

    def output(self) -> str:
        """Wait for the end and return what was printed."""
        self.process.wait(STOP_S)
        return self.printed.read_text()

    def left(self) -> list[str]:
        """Return the command lines that still run some time after the end."""
        deadline = time.monotonic() + STOP_S
        while (left := [p.pid for p in self.started if p.alive]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{pid} {command_line(pid)}" for pid in left]

    def clean_up(self) -> None:
        """End what a failed test left."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(STOP_S)
        for process in self.started:
            if process.alive:
                os.kill(process.pid, signal.SIGKILL)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    """Commands of a test; those that still run at its end are stopped."""
    running: list[Command] = []
    yield running
    for command in running:
        command.clean_up()


@pytest.fixture(scope="module")
def config_path(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "shop.yaml"
    path.write_text(yaml.safe_dump(shop.config.to_json()))
    return path


def listening(processes: set[Process]) -> set[tuple[str, int]]:
    """Return the TCP addresses that processes listen on, as (hexadecimal address, port)."""
    return _sockets(processes, "0A", 1)


def connected(processes: set[Process]) -> set[tuple[str, int]]:
    """Return the TCP addresses that processes are connected to."""
    return _sockets(processes, "01", 2)


def _sockets(processes: set[Process], state: str, column: int) -> set[tuple[str, int]]:
    inodes = set()
    for process in processes:
        folder = f"/proc/{process.pid}/fd"
        try:
            links = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in inodes:
                address, port = fields[column].split(":")
                found.add((address, int(port, 16)))
    return found


def check_the_end(command: Command, port: int, how: str) -> str:
    """End a service by SIGTERM, SIGKILL or Ctrl-C; nothing may be left of it. Returns what it printed."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as answer:
        assert answer.status == 200
    # HAProxy replaces its process when it reads its configuration again, also after the first answer.
    deadline = time.monotonic() + STOP_S
    while ("0100007F", port) not in listening(command.started) and time.monotonic() < deadline:
        time.sleep(0.1)
        command.look()
    names = [command_line(process.pid) for process in command.started]
    # The guard against a vacuous pass: all of these run and listen now.
    assert any("haproxy" in name for name in names)
    assert any("ServeReplica" in name for name in names)
    addresses = listening(command.started)
    assert ("0100007F", port) in addresses
    assert not any(p == port and address != "0100007F" for address, p in addresses)
    assert len(addresses) > 5

    if how == "Ctrl-C":
        # A terminal sends it to the whole process group, twice for an impatient person.
        os.killpg(command.process.pid, signal.SIGINT)
        os.killpg(command.process.pid, signal.SIGINT)
    else:
        os.kill(command.process.pid, signal.Signals[how])
    output = command.output()
    assert command.left() == []
    assert port_is_free("127.0.0.1", port)
    if how != "SIGKILL":
        assert command.process.returncode == 0, output
        lines = output.strip().splitlines()
        assert len(lines) < 20, output
        assert f"http://127.0.0.1:{port}" in output
        assert "curl" in output
        assert lines[-1].strip() == "stopped"
        assert "Traceback" not in output
    return output


def test_nothing_is_left_after_sigterm(config_path: Path, tmp_path: Path, commands: list[Command]) -> None:
    """After SIGKILL and Ctrl-C neither: so end the services of the tests of hardening and of sharding."""
    port = free_port()
    command = Command(tmp_path, "--config", str(config_path), "--set", f"serve.port={port}")
    commands.append(command)
    command.wait_until_ready()
    check_the_end(command, port, "SIGTERM")


def test_a_port_that_is_taken(config_path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        command = Command(tmp_path, "--config", str(config_path), "--set", f"serve.port={port}")
        output = command.output()
    assert command.process.returncode == 2
    assert f"port {port} on 127.0.0.1 is taken" in output
    assert "Traceback" not in output
    assert "Ray:" not in output, "Ray was started in vain"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "storage.root=/nowhere/at/all"], "nothing is published"),
        (["--pointer", "CANDIDATE"], "has no pointer CANDIDATE"),
        (["--set", "serve.prt=1"], "did you mean 'port'"),
        (["--set", "serve.port=0"], "serve.port"),
    ],
)
def test_what_can_not_be_served_says_so_at_once(
    config_path: Path, refused: Callable[..., str], arguments: list[str], message: str
) -> None:
    assert message in refused("--config", str(config_path), *arguments)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command in this process; returns what it printed before it gave up without Ray."""

    def no_ray(*_: object) -> None:
        raise AssertionError("Ray was asked for in vain")

    def run(*arguments: str) -> str:
        assert serve_job.main(arguments) == 2
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        return printed

    monkeypatch.setattr("serve.running._ray", no_ray)
    return run


def test_a_generation_with_a_wrong_byte_is_not_served(tmp_path: Path, refused: Callable[..., str]) -> None:
    config, _, generation = build_store(tmp_path)
    victim = generation / "shards" / "00001" / "index.faiss"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    path = tmp_path / "shop.yaml"
    path.write_text(json.dumps(config.to_json()))
    assert "index.faiss is damaged" in refused("--config", str(path))


def test_the_deploy_file_is_valid() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.build_app import build_app
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    from serve.app import build

    document: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(document)
    # Ray passes over keys that it does not know.
    assert set(document) <= set(ServeDeploySchema.model_fields)
    (application,) = document["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    assert schema.http_options.host == "127.0.0.1"
    assert application["import_path"] == "serve.app:build"
    built = build_app(
        call_user_app_builder_with_args_if_necessary(build, application["args"]),
        name="twotower",
        default_runtime_env={},
    )
    known = {deployment.name for deployment in built.deployments}
    for deployment in application["deployments"]:
        assert set(deployment) <= set(DeploymentSchema.model_fields)
        assert deployment["name"] in known

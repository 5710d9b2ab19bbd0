"""What befalls a job at a terminal: full disks, wrong paths, readers that go away, signals to its group."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import command
from twotower.errors import ConfigError

ROOT = Path(__file__).parents[2]
_DEADLINE_S = 60.0
_PROBE = """
import os, signal, sys, time
from pathlib import Path
from jobs import command
def work(config, arguments):
    {work}
sys.exit(command.run('probe', None, work, argv=sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _keep_the_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _run(work, *argv: str) -> int:
    return command.run("probe", "A probe.", work, argv=list(argv))


def _refused(config, arguments):
    raise OSError(errno.ENOSPC, "No space left on device", "/data/runs/x")


def _no_work(config, arguments):
    raise AssertionError("work was called")


def _start(work: str, *argv: str, **options) -> subprocess.Popen:
    code = _PROBE.format(work=work)
    return subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, text=True, **options)


def test_what_the_system_refused_is_one_line(capsys):
    assert _run(_refused) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("jobs.probe: /data/runs/x: no space is left on the disk; free some")


def test_debug_shows_the_stack_trace_and_the_line(capsys):
    assert _run(_refused, "--debug") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in _refused" in err
    assert err.strip().splitlines()[-1].startswith("jobs.probe: /data/runs/x: no space")


@pytest.mark.parametrize("path", ["", ".", "a-file/r.json", "/proc/r.json", "/dev/null/r.json"])
def test_a_result_that_can_not_be_written_is_told_before_any_work(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("x")
    assert _run(_no_work, "--result", path) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--result" in line
    assert "choose another path" in line or "give the path of a file" in line


def test_a_result_replaces_the_file_that_was_there_when_the_work_is_done(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")

    def work(config, arguments):
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
        return command.Result()

    assert _run(work, "--result", str(path)) == 0
    assert json.loads(path.read_text()) == {"job": "probe"}


def test_a_result_may_go_to_a_pipe_or_a_device_or_through_a_link(tmp_path):
    assert _run(lambda config, arguments: command.Result(), "--result", "/dev/null") == 0
    assert Path("/dev/null").is_char_device()
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    assert _run(lambda config, arguments: command.Result(), "--result", str(link)) == 0
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"job": "probe"}


def test_nobody_reading_stdout_is_no_failure(tmp_path):
    process = _start(
        "return command.Result(lines=['x' * 1000] * 1000)",
        "--result",
        str(tmp_path / "r.json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(_DEADLINE_S) == 0
    assert err == ""
    assert json.loads((tmp_path / "r.json").read_text()) == {"job": "probe"}


def test_nobody_reading_progress_is_no_failure():
    work = "from twotower.progress import bar, say, stage; stage('a'); say('b'); bar(1, 'c').close()"
    work += "; return command.Result()"
    process = _start(work, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stderr.close()
    out = process.stdout.read()
    process.stdout.close()
    assert process.wait(_DEADLINE_S) == 0
    assert out.startswith("TWOTOWER_RESULT")


def test_a_full_stdout_is_told_with_the_result():
    with open("/dev/full", "w") as full:
        process = _start("return command.Result(details={'x': 7})", stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == 1
    (line,) = err.strip().splitlines()
    assert "stdout took no result (No space left on device)" in line
    assert '{"job": "probe", "x": 7}' in line


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
    ],
)
def test_a_signal_to_the_whole_group_ends_the_job_with_its_clean_up(tmp_path, number, code, says):
    ready, clean = tmp_path / "ready", tmp_path / "clean"
    work = f"""
    import subprocess
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    try:
        Path({str(ready)!r}).touch()
        time.sleep(600)
    finally:
        child.wait()
        Path({str(clean)!r}).touch()
    """
    process = _start(work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
    deadline = time.monotonic() + _DEADLINE_S
    while not ready.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == code
    assert clean.exists()
    assert out == ""
    assert says in err
    assert "run it again to go on" in err.strip().splitlines()[-1]


def test_a_job_outlives_its_terminal_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = _start("os.kill(os.getpid(), 1); return command.Result()", stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, before)
    out, _ = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == 0
    assert out.startswith("TWOTOWER_RESULT")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("foo", "it is not HOST:PORT"),
        ("127.0.0.1:99999", "it is not HOST:PORT"),
        ("127.0.0.1:1", "refused"),
        ("ray://127.0.0.1:1", "refused"),
        ("no-such-host.invalid:6379", "not known|resolution"),
        (f"{'x' * 70}.com:6379", "no name of a host|not known|resolution"),
    ],
)
def test_a_wrong_address_of_ray_is_told_at_once(monkeypatch, address, says):
    from twotower.cluster.session import connect
    from twotower.config import load_config

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(
        ConfigError, match=rf"no Ray cluster answers at '.*' \(.*({says}).*unset RAY_ADDRESS"
    ) as caught:
        connect(load_config())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("/tmp/" + "x" * 60, r"is 65 bytes long, and Ray's sockets leave room for \d+; choose a shorter"),
        ("relative", "must be an absolute path"),
        ("/proc/nothing", "can not be written"),
        ("/dev/null", "can not be written"),
    ],
)
def test_a_folder_that_ray_can_not_use_is_told_at_once(monkeypatch, folder, says):
    from twotower.cluster.session import connect
    from twotower.config import load_config

    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(ConfigError, match=rf"RAY_TMPDIR \(.*{says}") as caught:
        connect(load_config())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failures", [1, 2])
def test_ray_that_does_not_start_is_tried_once_more(monkeypatch, capsys, failures):
    from twotower.cluster.session import connect
    from twotower.config import load_config
    from twotower.errors import SystemFaultError

    calls = []

    def init(**options):
        calls.append(options)
        if len(calls) <= failures:
            raise RuntimeError("The current node timed out during startup.\n  This could happen because")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
    monkeypatch.setattr("twotower.cluster.session.running_cluster", lambda: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.init", init)
    if failures == 1:
        assert connect(load_config())
        # One machine that is this one: no process need look out for nodes that are taken away.
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
    else:
        with pytest.raises(SystemFaultError, match="Ray did not start .*timed out during startup") as caught:
            connect(load_config())
        assert "\n" not in str(caught.value)
    assert len(calls) == 2
    assert "trying once more" in capsys.readouterr().err

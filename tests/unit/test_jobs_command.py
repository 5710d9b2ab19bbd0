"""The command line that all jobs share: exit codes, the result line, help, storage on clusters."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import command
from jobs.reference import config_reference
from twotower.config import Config, load_config
from twotower.errors import ConfigError, DataError, RefusedError, SystemFaultError

ROOT = Path(__file__).parents[2]
JOBS = [
    "prepare",
    "train",
    "tune",
    "build_index",
    "evaluate",
    "recommend",
    "pipeline",
    "generations",
    "update_items",
    "forget",
    "quickstart",
]
_DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def _keep_the_handler():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def _run(work, *argv: str) -> int:
    return command.run("probe", "A probe.", work, argv=list(argv))


def _last_object(out: str) -> dict:
    line = out.rstrip("\n").split("\n")[-1]
    prefix, _, value = line.partition(" ")
    assert prefix == "TWOTOWER_RESULT"
    return json.loads(value)


def test_the_result_is_the_last_line_on_stdout_and_in_the_file(tmp_path, capsys):
    def work(config, arguments):
        print("a library that prints")
        return command.Result(
            path=tmp_path, metrics={"recall@100": 0.5}, details={"x": 1}, lines=["for people"]
        )

    assert _run(work, "--result", str(tmp_path / "deep" / "r.json")) == 0
    captured = capsys.readouterr()
    expected = {"job": "probe", "path": str(tmp_path), "metrics": {"recall@100": 0.5}, "x": 1}
    assert captured.out.split("\n")[0] == "for people"
    assert _last_object(captured.out) == expected
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == expected
    assert "a library that prints" in captured.err


def test_work_gets_the_configuration_with_all_overrides(tmp_path, capsys):
    seen = []

    def work(config, arguments):
        seen.append(config)
        return command.Result()

    path = str(ROOT / "configs" / "generated.yaml")
    assert (
        _run(
            work, "--config", path, "--set", "seed=3", "train.epochs=5", "--set", "train.loss.temperature=0.2"
        )
        == 0
    )
    assert seen == [load_config(path, ["seed=3", "train.epochs=5", "train.loss.temperature=0.2"])]
    assert _last_object(capsys.readouterr().out) == {"job": "probe"}


def test_a_job_without_memory_says_so(capsys):
    def work(config, arguments):
        raise MemoryError("there is no memory for index.faiss")

    assert _run(work) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "jobs.probe: out of memory: there is no memory for index.faiss; run it again" in captured.err
    assert "Traceback" not in captured.err


def test_a_worker_without_memory_says_so():
    import pyarrow as pa

    from twotower.cluster.pool import Guarded, _raise_error

    class Full:
        def __init__(self, when):
            self.when = when
            if when == "made":
                raise MemoryError("there is no memory for the model")

        def __call__(self, part):
            raise MemoryError("there is no memory for index.faiss")

    for when, says in (("made", "the model"), ("called", r"index\.faiss")):
        (fact,) = Guarded(Full, {"when": when})(pa.table({"part": [1]})).to_pylist()
        with pytest.raises(SystemFaultError, match=f"out of memory: .*{says}"):
            _raise_error(fact)


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (DataError, 2), (RefusedError, 3)])
def test_errors_for_people_have_no_stack_trace(tmp_path, capsys, error, code):
    def work(config, arguments):
        raise error("what, where, what to do")

    assert _run(work, "--result", str(tmp_path / "r.json")) == code
    captured = capsys.readouterr()
    assert "jobs.probe: what, where, what to do" in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (tmp_path / "r.json").exists()


def test_other_errors_keep_their_stack_trace():
    def work(config, arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _run(work)


def test_a_wrong_configuration_exits_2_before_any_work(capsys):
    def work(config, arguments):
        raise AssertionError("work was called")

    assert _run(work, "--set", "train.epoch=3") == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err


def test_a_wrong_argument_exits_2():
    with pytest.raises(SystemExit) as stop:
        _run(lambda config, arguments: command.Result(), "--sett", "a=b")
    assert stop.value.code == 2


@pytest.mark.parametrize("code", [15, 143])
def test_the_exits_of_a_sigterm_become_143(code):
    def work(config, arguments):
        raise SystemExit(code)

    assert _run(work) == 143


def test_an_interrupt_exits_130_without_a_stack_trace(capsys):
    def work(config, arguments):
        raise KeyboardInterrupt

    assert _run(work) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_terminated_job_cleans_up_and_exits_143(tmp_path):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from jobs import command\n"
        "def work(config, arguments):\n"
        "    try:\n"
        "        Path(sys.argv[1], 'ready').touch()\n"
        "        time.sleep(600)\n"
        "    finally:\n"
        "        Path(sys.argv[1], 'clean').touch()\n"
        "sys.exit(command.run('probe', None, work, argv=[]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + _DEADLINE_S
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == 143
    assert (tmp_path / "clean").exists()
    assert out == ""
    assert "stopped by SIGTERM" in err
    assert "Traceback" not in err


def test_the_environment_of_ray_is_set_before_the_work(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", "")
    seen = []

    def work(config, arguments):
        seen.append(os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"])
        return command.Result()

    assert _run(work) == 0
    assert seen == ["1"]


def test_importing_the_jobs_loads_no_ray_and_no_torch():
    modules = ", ".join(f"jobs.{name}" for name in JOBS)
    found = "','.join(m for m in ('torch', 'ray', 'faiss') if m in sys.modules)"
    code = f"import sys, {modules}; sys.exit({found} or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_help_of_every_job_lists_every_key(job, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"jobs.{job}").main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m jobs.{job}" in out
    assert config_reference() in out


def test_the_reference_has_every_key_with_its_docstring():
    text = config_reference()

    def check(model, prefix):
        for name, info in model.model_fields.items():
            annotation = info.annotation
            if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
                check(annotation, f"{prefix}{name}.")
            else:
                assert info.description, f"{prefix}{name} has no docstring"
                assert f"  {prefix}{name}" in text, f"{prefix}{name} is missing"

    check(Config, "")
    assert "data.source[movielens].name" in text
    assert "type: history" in text
    assert "default 0.1" in text


@pytest.mark.parametrize(
    "address",
    ["", "auto", "local", "127.0.0.1:6379", "localhost:6379", "ray://127.0.0.1:10001", "[::1]:6379"],
)
@pytest.mark.sockets
def test_a_relative_root_is_fine_on_this_machine(address):
    command.check_storage(load_config(), {"RAY_ADDRESS": address})


@pytest.mark.sockets
def test_a_relative_root_is_fine_on_this_machine_by_its_name():
    command.check_storage(
        load_config(), {"RAY_ADDRESS": f"{socket.gethostbyname(socket.gethostname())}:6379"}
    )


# 203.0.113.0/24 is reserved for documentation.
@pytest.mark.parametrize("address", ["203.0.113.7:6379", "ray://203.0.113.7:10001"])
@pytest.mark.sockets
def test_a_relative_root_on_a_remote_cluster_is_refused(address):
    with pytest.raises(ConfigError, match=r"storage.root \(runs\).*203\.0\.113\.7.*absolute"):
        command.check_storage(load_config(), {"RAY_ADDRESS": address})


def test_a_relative_root_in_a_submitted_job_is_refused():
    with pytest.raises(ConfigError, match=r"temporary copy.*--set storage\.root="):
        command.check_storage(
            load_config(), {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_ADDRESS": "127.0.0.1:6379"}
        )


@pytest.mark.parametrize("root", ["/shared/runs", "~/runs"])
def test_an_absolute_root_is_fine_everywhere(root):
    config = load_config(None, [f"storage.root={root}"])
    command.check_storage(config, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}", "RAY_ADDRESS": "203.0.113.7:6379"})


def test_a_root_that_is_a_url_is_refused():
    with pytest.raises(ConfigError, match="is a URL"):
        command.check_storage(load_config(None, ["storage.root=s3://bucket/runs"]), {})

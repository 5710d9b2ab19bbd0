"""The jobs from raw data to published generation and offline top k, by their command lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs import build_index, evaluate, generations, prepare, recommend, train
from jobs.command import RESULT_PREFIX
from tests.pages import prepare_folder, run_shell, the_block
from twotower.cluster.processes import descendants
from twotower.data.dataset import Dataset

ROOT = Path(__file__).parents[2]
_DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def file(tmp_path_factory, small_values) -> Path:
    root = tmp_path_factory.mktemp("jobs")
    values = small_values(root / "runs", train={"epochs": 2, "global_batch_size": 256, "num_workers": 1})
    path = root / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def published(ray_local, file) -> dict:
    """What the README's command for own data makes of a small configuration."""
    folder = file.parent / "readme"
    prepare_folder(folder)
    (folder / "mine.yaml").symlink_to(file)
    printed = run_shell(the_block("README.md", "pipeline").text, folder)
    return json.loads(printed.splitlines()[-1].removeprefix(RESULT_PREFIX))


def _run(job, file: Path, *argv: str, before: tuple[str, ...] = ()) -> dict:
    result = file.with_name("result.json")
    result.unlink(missing_ok=True)
    assert job.main([*before, "--config", str(file), *argv, "--result", str(result)]) == 0
    return json.loads(result.read_text())


def _files(folder: Path) -> dict[str, int]:
    """Return when each file was written; locks are hidden files and do not count."""
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.glob("[!.]*/**/*")
        if p.is_file() and not p.name.startswith(".")
    }


def test_the_pipeline_publishes_what_it_made(published, file):
    store = file.parent / "runs" / "small" / "store"
    assert (store / "CURRENT").read_text().strip() == published["generation"]
    assert published["path"] == str(store / "generations" / published["generation"])
    assert published["checkpoint"] != published["evaluated_checkpoint"], "train.fit: all refits"
    assert 0 < published["metrics"]["recall@10"] <= 1
    assert "popularity_recall@10" in published["metrics"]
    assert published["metrics"]["index_recall@20"] == 1.0
    assert (Path(published["report"]) / "report.html").is_file()


def test_jobs_find_finished_work(published, file):
    manifests = [
        file.parent / "runs" / "small" / name for name in ("datasets", "checkpoints", "store/generations")
    ]
    before = [_files(folder) for folder in manifests]
    assert all(before)
    assert _run(prepare, file)["path"] == published["dataset"]
    trained = _run(train, file)
    assert trained["path"] == published["checkpoint"]
    assert trained["evaluated_checkpoint"] == published["evaluated_checkpoint"]
    assert 0 < trained["metrics"]["validation_recall@100"] <= 1
    assert _run(build_index, file, "--no-publish")["path"] == published["path"]
    assert _run(evaluate, file)["metrics"]["recall@10"] == published["metrics"]["recall@10"]
    assert [_files(folder) for folder in manifests] == before


def test_a_model_is_set_beside_another_report(published, file, capsys):
    name = Path(published["report"]).name
    result = _run(evaluate, file, "--compare", name)
    assert result["path"] != published["report"]
    # The same model: every user is the same.
    content = json.loads((Path(result["path"]) / "report.json").read_text())
    assert content["differences"]["compared"]["recall@10"] == {"difference": 0, "low": 0, "high": 0, "p": 1}
    assert result["metrics"]["compared_recall@10"] == result["metrics"]["recall@10"]
    capsys.readouterr()
    assert evaluate.main(["--config", str(file), "--compare", "nowhere"]) == 2
    assert "--compare nowhere: there is no finished report" in capsys.readouterr().err


def test_inputs_can_be_named(published, file):
    result = _run(
        build_index,
        file,
        "--dataset",
        published["dataset"],
        "--checkpoint",
        published["evaluated_checkpoint"],
        "--no-publish",
    )
    assert result["checkpoint"] == published["evaluated_checkpoint"]
    assert result["generation"] != published["generation"]
    assert _run(generations, file, before=("list",))["pointers"]["CURRENT"] == published["generation"]


def test_nobody_is_recommended_what_he_has_had(published, file):
    result = _run(recommend, file)
    table = pq.read_table([str(p) for p in Path(result["path"]).rglob("*.parquet")]).to_pydict()
    dataset = Dataset.open(published["dataset"])
    interactions = dataset.interactions
    users, items = dataset.user_ids, dataset.item_ids
    had = {
        (users.id(int(user)), items.id(int(item)))
        for user, item in zip(interactions.user_row, interactions.item_row, strict=True)
    }
    offered = list(zip(table["user_id"], table["item_id"], strict=True))
    assert len(offered) == 8 * dataset.num_users
    assert len(set(offered)) == len(offered)
    assert had.isdisjoint(offered)


def test_generations_are_listed_verified_and_published(published, file, capsys):
    listed = _run(generations, file, before=("list",))
    assert published["generation"] in {row["id"] for row in listed["generations"]}
    assert "<- CURRENT" in capsys.readouterr().out
    assert _run(generations, file, before=("verify",))["verified"] is True
    name = published["generation"]
    assert _run(generations, file, "--pointer", "CANDIDATE", before=("publish", name))["generation"] == name
    assert (file.parent / "runs" / "small" / "store" / "CANDIDATE").read_text().strip() == name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["publish", "absent"], "no such generation"),
        (["publish"], "needs the id"),
        (["verify", "absent"], "no such generation"),
    ],
)
def test_a_wrong_generation_is_explained(published, file, capsys, argv, message):
    assert generations.main([*argv, "--config", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_a_gate_that_refuses_exits_3_and_leaves_the_pointer(published, file, capsys):
    # Codes of one byte an item find a fraction of the exact top k.
    poor = ["index.factory=PQ2x4", "index.target_index_recall=1.0", "index.num_shards=1"]
    store = file.parent / "runs" / "small" / "store"
    before = (store / "CURRENT").read_text()
    code = build_index.main(["--config", str(file), "--set", *poor])
    if code == 0:
        pytest.fail(f"index recall reached 1.0 with {poor}: the gate was not tested")
    assert code == 3
    assert "is not published" in capsys.readouterr().err
    assert (store / "CURRENT").read_text() == before


def test_a_signal_to_the_whole_group_during_a_call_of_ray_leaves_no_process(tmp_path):
    # Ctrl-C is tested where a training is interrupted.
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from jobs import command, stages\n"
        "def work(config, arguments):\n"
        "    with stages.on_ray(config):\n"
        "        import ray\n"
        "        wait = ray.remote(num_cpus=0.5)(lambda: time.sleep(600)).remote()\n"
        "        Path(sys.argv[1]).touch()\n"
        "        ray.get(wait)\n"
        "sys.exit(command.run('probe', None, work, argv=[]))\n"
    )
    ready = tmp_path / "ready"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(ready)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + _DEADLINE_S
    while not ready.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = descendants(process.pid)
    assert started, "Ray was not started by the job"
    # As a terminal's Ctrl-C, or `timeout`, does.
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == 143
    assert out == ""
    assert "stopped by SIGTERM" in err
    assert "Traceback" not in err
    while any(child.alive for child in started):
        assert time.monotonic() < deadline, "processes of Ray outlived the job"
        time.sleep(0.05)

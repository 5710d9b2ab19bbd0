"""The public face: light to import, typed, and the whole way in one process."""

from __future__ import annotations

import ast
import doctest
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import twotower as tt
from tests.conftest import ROOT
from tests.pages import the_block
from twotower.artefacts import read_manifest
from twotower.errors import ArtefactMismatchError, ConfigError, RefusedError, TrainingError
from twotower.generations.store import Store
from twotower.training.loop import Trainer

NAMES = [name for name in tt.__all__ if name != "__version__"]


def purchases(num_users: int = 24, num_items: int = 18) -> dict[str, list[Any]]:
    """Users who take items of the half that they belong to."""
    rng = np.random.default_rng(3)
    half = num_items // 2
    rows = [
        (f"u{user}", f"i{user % 2 * half + int(item)}", 60 * user + place)
        for user in range(num_users)
        for place, item in enumerate(rng.permutation(half)[:7])
    ]
    users, items, minutes = zip(*rows, strict=True)
    return {"user": list(users), "item": list(items), "minute": list(minutes)}


def settings(root: Path, **values: Any) -> dict[str, Any]:
    return {
        "name": "face",
        "storage.root": str(root),
        "data.source.columns": {"user": "user", "item": "item", "time": "minute", "time_unit": "s"},
        "data.source.items": {"id": "item", "title": "name"},
        "features.query": [{"name": "history", "type": "history", "dim": 8}],
        "features.item": [{"name": "item_id", "type": "id", "dim": 8}],
        "model.embedding_dim": 8,
        "train.epochs": 3,
        "train.global_batch_size": 24,
        "train.num_workers": 1,
        "evaluation.latency_requests": 5,
        **values,
    }


ITEMS = {"item": [f"i{n}" for n in range(18)], "name": [f"Item {n}" for n in range(18)]}


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The whole way, in this process; do not change it."""
    config = tt.configure(settings(tmp_path_factory.mktemp("face")))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        data = tt.prepare(config, interactions=purchases(), items=ITEMS)
        checkpoints = tt.train(config, data)
        generation = tt.build(config, data, checkpoints)
        report = tt.evaluate(config, data, checkpoints, generation)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    return SimpleNamespace(
        config=config,
        data=data,
        checkpoints=checkpoints,
        generation=generation,
        report=report,
        after=after,
    )


def run_new(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that has imported nothing yet."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_importing_it_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import twotower; print(*set(sys.modules) - before)"
    done = run_new(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["twotower"]


def test_a_name_loads_what_it_needs() -> None:
    code = "import sys, twotower as tt; tt.configure({'seed': 1}); tt.Client, tt.Query; print(*sys.modules)"
    done = run_new(code)
    assert done.returncode == 0, done.stderr
    assert {"ray", "torch", "faiss", "pandas", "pyarrow"}.isdisjoint(done.stdout.split())
    assert "pydantic" in done.stdout.split()


def test_names_are_those_that_type_checkers_see() -> None:
    stub = ast.parse((ROOT / "twotower" / "__init__.pyi").read_text())
    seen = {
        alias.asname: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == tt._MODULES
    assert sorted(tt.__all__) == sorted([*seen, "__version__"])
    assert set(tt.__all__) <= set(dir(tt))
    for name in NAMES:
        assert getattr(tt, name).__name__ == name
    assert (ROOT / "twotower" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="'twotower' has no attribute 'fit'"):
        _ = tt.fit  # type: ignore[attr-defined]


@pytest.fixture
def url() -> Iterator[str]:
    from tests.scripted import GOOD, scripted_server, send

    titles = ("Heat", "Alien")
    answer = GOOD | {"items": [{"item_id": t, "score": 0.5, "title": t} for t in titles]}
    with scripted_server() as server:
        server.script = lambda handler, number: send(handler, answer)
        yield server.url


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.sockets] if n == "Client" else []) for n in NAMES]
)
def test_each_name_has_an_example_that_runs(
    name: str, way: SimpleNamespace, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {**vars(way), "tt": tt, "url": request.getfixturevalue("url") if name == "Client" else None}
    found = inspect.getdoc(getattr(tt, name))
    assert found is not None
    example = doctest.DocTestParser().get_doctest(found, names, name, None, None)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=said.append).failed == 0, "".join(said)


def test_the_steps_write_what_the_jobs_would(way: SimpleNamespace) -> None:
    config = way.config
    chosen, evaluated, served = (
        read_manifest(path, "checkpoint")
        for path in (way.checkpoints.chosen, way.checkpoints.evaluated, way.checkpoints.served)
    )
    assert [m["fit"] for m in (chosen, evaluated, served)] == ["train", "known", "all"]
    assert chosen["history"][0]["validation_recall"] is not None
    assert len(served["history"]) == chosen["best_epoch"] == served["chosen"]["best_epoch"]
    assert not list((config.checkpoints / ".runs").glob("[!.]*"))
    assert Store(config.store).current() == way.generation.name
    manifest = read_manifest(way.generation, "generation")
    assert manifest["index"]["index_recall"] == 1.0
    assert manifest["checkpoint_fingerprint"] == served["fingerprint"]
    assert way.report.metrics["latency_p50_ms"] > 0
    assert way.report.by_ranker["model"]["recall@10"] == way.report.metrics["recall@10"]
    assert way.report.page.is_file()
    assert way.after == 3, "the caller's threads were changed"


def test_finished_steps_are_found(way: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert tt.prepare(way.config, interactions=purchases(), items=ITEMS).path == way.data.path
    assert tt.train(way.config, way.data) == way.checkpoints
    assert tt.build(way.config, way.data, way.checkpoints) == way.generation
    report = tt.evaluate(way.config, way.data, way.checkpoints, way.generation)
    assert report == way.report
    assert capsys.readouterr().err.count("is there already") == 6


def test_a_gate_refuses_here_too(way: SimpleNamespace) -> None:
    slow = tt.configure({"index.max_search_ms": 1e-9}, base=way.config)
    with pytest.raises(RefusedError, match="max_search_ms"):
        tt.build(slow, way.data, way.checkpoints)
    store = Store(way.config.store)
    assert store.current() == way.generation.name
    built = tt.build(slow, way.data, way.checkpoints, publish=False)
    assert store.has(built.name)


def test_a_step_takes_as_many_threads_as_it_is_told_and_gives_the_number_back(
    way: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"train.threads_per_worker": 2, "train.epochs": 1, "train.fit": "train"}
    config = tt.configure(values | {"storage.root": str(tmp_path)}, base=way.config)
    seen = set()
    plain = Trainer._train_on

    def looks(*arguments: Any) -> Any:
        seen.add(torch.get_num_threads())
        return plain(*arguments)

    monkeypatch.setattr(Trainer, "_train_on", looks)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tt.train(config, way.data)
        assert torch.get_num_threads() == 3
        diverging = tt.configure({"train.optimizer.learning_rate": 1e30}, base=config)
        with pytest.raises(TrainingError, match="must be finite"):
            tt.train(diverging, way.data)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {2}


def test_an_interrupted_training_goes_on_and_ends_as_if_undisturbed(
    way: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {"storage.root": str(tmp_path), "train.checkpoint_every_steps": 2}
    config = tt.configure(values, base=way.config)
    made: list[int] = []
    plain = Trainer._train_on

    def interrupted(trainer: Trainer, *arguments: Any) -> Any:
        # In the second epoch, behind a state inside it.
        if trainer.step == trainer.source.steps_per_epoch + 3:
            raise KeyboardInterrupt
        made.append(trainer.step)
        return plain(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_on", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tt.train(config, way.data)
    kept = list((config.checkpoints / ".runs").glob("*/one-process/*"))
    assert len(kept) == 1, "older states are removed"
    capsys.readouterr()
    again = tt.train(config, way.data)
    assert f"goes on from step {made[-1]}" in capsys.readouterr().err
    for name in ("chosen", "evaluated", "served"):
        found, wanted = (read_manifest(getattr(c, name), "checkpoint") for c in (again, way.checkpoints))
        assert found["fingerprint"] == wanted["fingerprint"]
    assert not list((config.checkpoints / ".runs").glob("[!.]*"))


def test_streamed_interactions_need_no_ray(way: SimpleNamespace, tmp_path: Path) -> None:
    values = {"storage.root": str(tmp_path), "train.ingest": "stream", "train.fit": "train"}
    checkpoints = tt.train(tt.configure(values, base=way.config), way.data)
    history = read_manifest(checkpoints.chosen, "checkpoint")["history"]
    assert history[-1]["loss"] < history[0]["loss"]


def test_what_does_not_fit_is_refused_before_it_costs(way: SimpleNamespace, tmp_path: Path) -> None:
    large = tt.configure({"train.global_batch_size": 4_000}, base=way.config)
    with pytest.raises(ConfigError, match="global_batch_size"):
        tt.train(large, way.data)
    with pytest.raises(ConfigError, match="index.attributes"):
        tt.build(tt.configure({"index.attributes": {"colour": {}}}, base=way.config), way.data, tmp_path)
    with pytest.raises(ConfigError, match="fitted on every interaction, the test split included"):
        tt.evaluate(way.config, way.data, way.checkpoints.served)
    other = tt.configure({"name": "other"}, base=way.config)
    fewer = tt.prepare(other, interactions=purchases(num_users=20), items=ITEMS)
    with pytest.raises(ArtefactMismatchError, match="vocabulary"):
        tt.build(other, fewer, way.checkpoints)


@pytest.mark.sockets
def test_a_cluster_elsewhere_needs_a_folder_that_it_can_reach(
    way: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tt.configure({"storage.root": "runs"}, base=way.config)
    steps: list[Callable[[], object]] = [
        lambda: tt.train(here, way.data, address="203.0.113.7:6379"),
        lambda: tt.build(here, way.data, way.checkpoints, address="203.0.113.7:6379"),
        lambda: tt.evaluate(here, way.data, way.checkpoints, address="203.0.113.7:6379"),
    ]
    for step in steps:
        with pytest.raises(ConfigError, match=r"storage.root \(runs\) is relative.*another machine"):
            step()


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    page = (ROOT / "docs" / "library.md").read_text()
    lines = the_block("docs/library.md", "library").text
    log = pd.DataFrame(purchases()).rename(columns={"user": "customer", "item": "sku"})
    log["day"] = pd.to_datetime(log.pop("minute"), unit="D")
    log["customer"] = "c" + log["customer"].str[1:]
    monkeypatch.chdir(tmp_path)
    log.to_parquet("purchases.parquet")
    pd.DataFrame({"sku": ITEMS["item"], "name": ITEMS["name"]}).to_csv("products.csv", index=False)
    names: dict[str, Any] = {}
    exec(compile(lines, "docs/library.md", "exec"), names)
    answer = names["answer"]
    assert len(answer.items) == 10
    assert answer.items[0]["title"].startswith("Item ")
    # Everything that is listed there is there, and the other way round.
    listed = set(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", " ".join(listed))) == set(NAMES)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    path = ROOT / "examples" / "quickstart.ipynb"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.notebook", str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["ray"]
    assert found["recall"]["model"] > 2 * found["recall"]["popularity"]
    assert found["unknown"] == ["tea"] * 5
    assert found["cocoa"] == ["cocoa"] * 5
    assert found["figures"] == [1, 2]

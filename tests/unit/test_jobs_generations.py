"""jobs.generations from the command line, on a store that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import generations, stages
from tests.generations import edit_index, edit_manifest
from twotower.config import Config, load_config
from twotower.generations.store import Store


@pytest.fixture
def config_file(filled: Config, store: Store, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    values = filled.to_json()
    values["storage"]["root"] = str(tmp_path)
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def run(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        code = generations.main([*arguments, "--config", str(config_file)])
        out, err = capsys.readouterr()
        *lines, last = out.splitlines() or [""]
        result = json.loads(last.removeprefix("TWOTOWER_RESULT ")) if not code else {}
        return code, "\n".join(lines) if not code else err, result

    return call


def test_from_a_list_to_a_roll_back(run: Any, store: Store) -> None:
    assert run("publish", "a")[0] == 0
    assert run("publish", "b", "--pointer", "candidate")[2]["pointer"] == "candidate"
    code, text, result = run("list")
    assert code == 0
    assert result["pointers"] == {"CURRENT": "a", "candidate": "b"}
    assert [row["id"] for row in result["generations"]] == ["b", "a", "c"]
    assert [line.split("<-")[1].strip() for line in text.splitlines() if "<-" in line] == [
        "candidate",
        "CURRENT",
    ]
    assert run("publish", "b")[0] == 0
    code, text, result = run("rollback")
    assert (result["generation"], result["previous"]) == ("a", "b")
    assert "CURRENT -> a, rolled back from b" in text
    assert store.current() == "a"
    code, text, _ = run("rollback")
    assert code == 3
    assert "nothing to roll back to" in text


@pytest.mark.parametrize("places", ["action config id", "config action id", "action id config"])
def test_arguments_may_stand_on_either_side_of_the_configuration(
    config_file: Path, store: Store, places: str
) -> None:
    said = {"action": ["publish"], "id": ["b"], "config": ["--config", str(config_file)]}
    assert generations.main([word for place in places.split() for word in said[place]]) == 0
    assert store.current() == "b"


def test_a_gate_is_overridden_by_force_and_that_is_recorded(run: Any, store: Store) -> None:
    edit_index(store.path("a"), index_recall=0.5)
    code, text, _ = run("publish", "a")
    assert code == 3
    assert "0.5000" in text
    assert run("publish", "a", "--force")[0] == 0
    assert [(e.forced, len(e.reasons)) for e in store.publications()] == [(True, 1)]


def test_inspect_shows_the_curve_the_shards_and_what_is_shared(run: Any, store: Store) -> None:
    points = [
        {"effort": {"nprobe": n}, "index_recall": r, "search_ms": ms}
        for n, r, ms in ((4, 0.91, 0.1), (8, 0.96, 0.25))
    ]
    edit_index(store.path("a"), curve=points, effort={"nprobe": 8}, reason="210 items are few")
    delta = {"base": "b", "added": 3, "changed": 1, "deleted": 2, "share": 6 / 210}
    edit_manifest(store.path("a"), delta=delta)
    run("publish", "a")
    code, text, result = run("inspect")
    assert code == 0
    (chosen,) = [line for line in text.splitlines() if line.endswith("<- chosen")]
    assert "nprobe 8" in chosen
    assert "0.9600" in chosen
    assert "0.250" in chosen
    assert "nprobe 4" in text
    assert "210 items are few" in text
    assert "3 added, 1 changed, 2 deleted (2.86% of the build)" in text
    assert sum(shard["rows"] for shard in result["shards"]) == 210
    # Both are of the same checkpoint and dataset.
    manifest = store.manifest("a")
    assert result["shared_bytes"]["b"] == sum(f["bytes"] for f in manifest["files"].values())
    assert result["generation"] == "a"
    assert run("inspect", "nope")[0] == 2


def test_prune_says_what_goes(run: Any, store: Store) -> None:
    run("publish", "a")
    code, text, _ = run("prune")
    assert code == 2
    assert "storage.keep_generations" in text
    assert run("prune", "--keep", "1", "--grace-hours", "-1")[0] == 2
    assert run("prune", "--keep", "0")[0] == 2
    code, text, result = run("prune", "--keep", "1", "--dry-run")
    assert result["removed"] == ["b"]
    assert "would remove generation b" in text
    assert store.has("b")
    code, text, result = run("prune", "--keep", "1")
    assert result["removed"] == ["b"]
    assert result["freed_bytes"] > 0
    assert not store.has("b")
    assert run("verify")[0] == 0


def test_a_job_that_publishes_applies_the_retention(config_file: Path, store: Store) -> None:
    config = load_config(config_file, ["storage.keep_generations=1"])
    stages.publish(config, "b")
    assert store.generations() == ["b", "c"]
    stages.publish(load_config(config_file), "c")
    assert store.generations() == ["b", "c"]
    stages.retain(config)
    assert store.generations() == ["c"]

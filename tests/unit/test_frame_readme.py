"""What the README shows exists and works: its configuration, files, jobs and targets."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from twotower.config import parse_config
from twotower.data.prepare import prepare

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_configuration_for_own_data_prepares(tmp_path, monkeypatch, rng):
    [text] = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "data" / "events").mkdir(parents=True)
    users, skus = rng.integers(0, 30, 900), rng.integers(100, 140, 900)
    events = {
        "customer": users,
        "sku": [str(sku) for sku in skus],
        "ts": 1_700_000_000 + rng.permutation(900),
        "action": rng.choice(["purchase", "view", "hide"], 900),
    }
    pq.write_table(pa.table(events), tmp_path / "data" / "events" / "part-0.parquet")
    with open(tmp_path / "data" / "products.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sku", "name", "category"])
        rows.writerows((sku, f"Thing {sku}", "abc"[sku % 3]) for sku in range(100, 145))

    monkeypatch.chdir(tmp_path)
    dataset = prepare(parse_config(yaml.safe_load(text)))
    assert dataset.num_users == 30
    assert dataset.num_catalogue_items == 45
    assert {feature.spec.name for feature in dataset.schema.item} == {"item_id", "category", "name"}


def test_jobs_and_targets_exist():
    jobs = set(re.findall(r"-m jobs\.(\w+)", README)) | set(
        re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    )
    assert len(jobs) >= 8
    assert {job for job in jobs if not (ROOT / "jobs" / f"{job}.py").is_file()} == set()
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"\bmake (quick\w+|serve|setup|help|test|lint|\w+ [A-Z_]+=)", README))
    assert {word.split()[0] for word in mentioned} <= targets


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:configs|deploy|twotower|serve)/[\w./-]+)`", README)))
)
def test_paths_in_backquotes_exist(path):
    assert (ROOT / path).exists()


def test_the_tree_names_every_module_of_the_library():
    tree = README[README.index("\ntwotower/  ") :].partition("```")[0]
    words = set(re.findall(r"[\w/.]+", tree))
    shown = {word.strip("/") for word in words}
    for folder in (ROOT / "twotower").iterdir():
        if folder.is_dir() and (folder / "__init__.py").is_file():
            assert folder.name in shown, f"twotower/{folder.name} is not in the README's tree"
    for path in set(
        re.findall(r"\b((?:model|index|cluster|generations|retrieval|lifecycle)/\w+\.py)", README)
    ):
        assert (ROOT / "twotower" / path).is_file(), f"{path} is mentioned and does not exist"

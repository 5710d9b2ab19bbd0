"""What the pages show is run: commands in a folder with a small model, configurations, HTTP requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import yaml

from tests.generations import plain_generation, untrained_checkpoint
from tests.pages import Block, blocks, check_in_process, commands_of, prepare_folder, run_shell, the_block
from twotower.config import parse_config
from twotower.data.prepare import prepare
from twotower.errors import ConfigError
from twotower.generations.store import Store
from twotower.retrieval.retriever import Retriever

NUM_USERS, NUM_ITEMS = 50, 60


def write_own_data(folder: Path) -> None:
    """Write what the README's ten lines read; items have genres and a year too, for filters."""
    rng = np.random.default_rng(4)
    (folder / "data" / "events").mkdir(parents=True)
    log = {
        "customer": rng.integers(0, NUM_USERS, 1_500),
        "sku": [str(sku) for sku in rng.integers(1, NUM_ITEMS, 1_500)],
        "ts": 1_700_000_000 + rng.permutation(1_500),
        "action": rng.choice(["purchase", "view", "hide"], 1_500),
    }
    pq.write_table(pa.table(log), folder / "data" / "events" / "part-0.parquet")
    numbers = range(1, NUM_ITEMS + 5)
    products = {
        "sku": list(numbers),
        "name": [f"Thing {n}" for n in numbers],
        "category": ["abc"[n % 3] for n in numbers],
        "genres": ["Comedy|Drama" if n % 2 else "War" for n in numbers],
        "year": [1980 + n % 40 for n in numbers],
    }
    pacsv.write_csv(pa.table(products), folder / "data" / "products.csv")


def write_files_for_init(folder: Path) -> None:
    """Write what the commands of ``twotower init`` read."""
    rng = np.random.default_rng(5)
    ratings = {
        "userId": rng.integers(1, 40, 800),
        "movieId": rng.integers(1, 60, 800),
        "rating": rng.choice([1.0, 2.5, 4.0, 5.0], 800),
        "timestamp": 1_700_000_000 + rng.permutation(800),
    }
    pacsv.write_csv(pa.table(ratings), folder / "ratings.csv")
    movies = {"movieId": list(range(1, 60)), "title": [f"Film {n} of many" for n in range(1, 60)]}
    pacsv.write_csv(pa.table(movies), folder / "movies.csv")
    for number in range(3):
        events = {
            "timestamp": 1_433_000_000_000 + rng.permutation(1_000) * 1_000,
            "visitorid": rng.integers(0, 300, 1_000),
            "event": rng.choice(["view", "addtocart", "transaction"], 1_000),
            "itemid": rng.integers(0, 90, 1_000),
        }
        pacsv.write_csv(pa.table(events), folder / f"events-2015-{number:02}.csv")
    pq.write_table(pa.table({"itemid": list(range(100))}), folder / "products.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's ten lines, data for them, and two published generations, untrained."""
    folder = tmp_path_factory.mktemp("pages")
    prepare_folder(folder)
    write_own_data(folder)
    write_files_for_init(folder)
    text = the_block("README.md", "own-data").text
    (folder / "mine.yaml").write_text(text)
    values = yaml.safe_load(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = parse_config(values)
        dataset = prepare(config)
        checkpoint = untrained_checkpoint(config, dataset, config.checkpoints / "c")
        values["name"] = "films"
        values["index"] = {"attributes": {"genres": {"separator": "|"}, "year": {"type": "integer"}}}
        films = parse_config(values)
        for target, name in ((config, "first"), (config, "second"), (films, "films")):
            plain_generation(target, dataset, checkpoint, name)
            Store(target.store).publish(name)
    return folder


def test_the_ten_lines_read_what_they_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    dataset = prepare(parse_config(yaml.safe_load(the_block("README.md", "own-data").text)))
    assert dataset.num_users == NUM_USERS
    assert dataset.num_catalogue_items == NUM_ITEMS + 4
    assert {feature.spec.name for feature in dataset.schema.item} == {"item_id", "category", "name"}


@pytest.mark.parametrize("block", [b for b in blocks("run", "") if b.language == "yaml"], ids=str)
def test_configurations_are_read(block: Block) -> None:
    values = yaml.safe_load(block.text)
    assert values
    parse_config(values)


SHELL = [b for b in blocks("run") if b.detail in ("", "same output") and b.language in ("bash", "console")]


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_run(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, shown = commands_of(block.text) if block.language == "console" else (block.text, "")
    # Other blocks may have written what this one writes, as two people's would not.
    (folder / "config.yaml").unlink(missing_ok=True)
    monkeypatch.setenv("COLUMNS", "200")
    printed = run_shell(script, folder)
    if block.detail == "same output":
        assert printed == shown


def test_commands_that_fail_are_noticed(folder: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 2"):
        run_shell("python -m jobs.generations list --config nowhere.yaml", folder)
    with pytest.raises(AssertionError, match="exit code 1"):
        run_shell("false\ntrue", folder)


@pytest.mark.parametrize("block", blocks("check"), ids=str)
def test_commands_that_take_long_are_read(block: Block, folder: Path) -> None:
    script = commands_of(block.text)[0] if block.language == "console" else block.text
    run_shell(script, folder, check_in_process)


def test_commands_that_are_only_read_must_be_right(folder: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 2"):
        run_shell("twotower train --confi x", folder, check_in_process)
    with pytest.raises(ConfigError, match="epochs"):
        run_shell("twotower train --set train.epoch=3", folder, check_in_process)
    with pytest.raises(AssertionError, match="exit code 2"):
        run_shell("make no-such-target", folder, check_in_process)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The service's routes over a generation with attributes, without Ray."""
    import uvicorn

    from serve.api import make_api
    from serve.fused import FusedService

    [path] = (folder / "runs" / "films" / "store" / "generations").glob("films")
    retriever = Retriever.open(path, threads=1)
    retriever.warm_up()
    api = make_api(FusedService(retriever, 100, 1, {"active": {}, "missing": {}}, 1), request_ids=False)
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.02)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.sockets
@pytest.mark.parametrize("block", blocks("run", "http"), ids=str)
def test_requests_are_answered(
    block: Block, folder: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = block.text.replace("127.0.0.1:8000", url)
    assert text != block.text
    if block.language == "python":
        exec(compile(text, str(block), "exec"), {})
        assert "personal" in capsys.readouterr().out
        return
    # curl is told to fail where the service refuses.
    run_shell(text.replace("curl -s", "curl -sS --fail-with-body"), folder)

"""Stores with generations, in a folder and in a bucket."""

from __future__ import annotations

import http.client
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.following import Make, User
from tests.generations import edit_manifest, plain_generation, untrained_checkpoint
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.generations.opening import store_at
from twotower.generations.store import Store


@pytest.fixture(scope="session")
def filled(
    tmp_path_factory: pytest.TempPathFactory,
    small_values: Callable[..., dict[str, Any]],
    small_dataset: Dataset,
) -> Config:
    """A configuration whose store holds b, a and c, made in this order; do not change it."""
    config = parse_config(small_values(tmp_path_factory.mktemp("store")))
    checkpoint = untrained_checkpoint(config, small_dataset, config.checkpoints / "c")
    # The names and the times of making are in opposite orders.
    for name in ("b", "a", "c"):
        directory = plain_generation(config, small_dataset, checkpoint, name)
        edit_manifest(directory, created={"b": "1", "a": "2", "c": "3"}[name])
    return config


@pytest.fixture
def store(filled: Config, tmp_path: Path) -> Store:
    """A copy of that store, nothing published."""
    return Store(shutil.copytree(filled.store, tmp_path / "small" / "store"))


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """The URL of a server of the S3 protocol."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    # S3 compares and writes in one step; the stand-in does not without this.
    turn, plain = threading.Lock(), S3Response.put_object

    def put_object(self: S3Response) -> Any:
        with turn:
            return plain(self)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of an empty place in a bucket of this test, and the environment that leads to it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    name = f"b{abs(hash(request.node.nodeid)):x}"
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    return f"s3://{name}/some/place"


@pytest.fixture
def here(store: Store, bucket: str) -> Store:
    """A bucket, and a folder in which b, a and c were built and not pushed."""
    return store_at(bucket, store.root)


@pytest.fixture
def elsewhere(bucket: str, tmp_path: Path) -> Store:
    """The same bucket from a machine that has nothing."""
    return store_at(bucket, tmp_path / "elsewhere" / "store")


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes a user of a store's pointer, whose follower ends with the test."""
    users: list[User] = []

    def start(store: Store, **arguments: Any) -> User:
        users.append(User(store, **arguments))
        return users[-1]

    yield start
    for user in users:
        user.follower.close()

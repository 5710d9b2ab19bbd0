"""One published generation, and one real Serve on loopback for the whole run."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.shop import build_store
from twotower.cluster.processes import free_port
from twotower.cluster.service import running
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.retrieval.retriever import Retriever


@dataclass(frozen=True)
class Shop:
    """The published generation."""

    config: Config
    dataset: Dataset
    generation: Path


@dataclass(frozen=True)
class Reply:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    content: bytes
    names: list[str]
    """Names of the headers, in lower case, as often as each came."""

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Client:
    """Sends single requests and shows exactly what came back."""

    def __init__(self, url: str) -> None:
        self.url = url

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """Send one request; a body that is neither bytes nor None is sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            headers = [(name.lower(), value) for name, value in answer.getheaders()]
            return Reply(answer.status, dict(headers), answer.read(), [name for name, _ in headers])
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        """Send a GET."""
        return self.send("GET", path, headers=headers)

    def retrieve(self, **body: Any) -> Reply:
        """Send a retrieve request."""
        return self.send("POST", "/v1/retrieve", body)

    def items(self, **body: Any) -> list[dict[str, Any]]:
        """Return the items of a retrieve request that must succeed."""
        reply = self.retrieve(**body)
        assert reply.status == 200, reply.content
        return list(reply.json["items"])


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A published generation on a free port; do not change it."""
    config, dataset, generation = build_store(tmp_path_factory.mktemp("shop"))
    values = config.to_json()
    values["serve"]["port"] = free_port()
    values["serve"]["probe_every"] = 1
    return Shop(parse_config(values), dataset, generation)


@pytest.fixture(scope="session")
def client(shop: Shop, ray_local: None) -> Iterator[Client]:
    """A client of the service that runs for the whole run."""
    with running(shop.config) as url:
        yield Client(url)


@pytest.fixture(scope="session")
def library(shop: Shop) -> Retriever:
    """The same generation without HTTP."""
    return Retriever.open(shop.generation)

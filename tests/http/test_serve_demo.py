"""The demo page's files and what it asks for, over HTTP; how the page behaves is tested in a browser."""

from __future__ import annotations

import asyncio
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from serve import deployments
from serve.app import BuildArgs, build
from tests.service import Client, Shop
from tests.shop import HOSTILE_TITLES
from twotower.retrieval.lookup import find_items, find_users, user_history
from twotower.retrieval.retriever import Retriever

ROOT = Path(__file__).parents[2]
FILES = {
    "/": "text/html; charset=utf-8",
    "/demo/page.css": "text/css; charset=utf-8",
    "/demo/page.js": "text/javascript; charset=utf-8",
    "/demo/asking.js": "text/javascript; charset=utf-8",
    "/demo/combobox.js": "text/javascript; charset=utf-8",
    "/demo/filters.js": "text/javascript; charset=utf-8",
    "/demo/icon.svg": "image/svg+xml",
}


def test_every_file_of_the_page_is_served_and_packaged() -> None:
    names = {path.name for path in (ROOT / "serve" / "page").iterdir()}
    assert names == {path.rpartition("/")[2] or "index.html" for path in FILES}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["serve"] == ["page/*"]


@pytest.mark.parametrize(("path", "kind"), FILES.items())
def test_files_of_the_page(client: Client, path: str, kind: str) -> None:
    reply = client.get(path)
    assert (reply.status, reply.headers["content-type"]) == (200, kind)
    assert len(reply.content) > 100
    policy = reply.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    # Another version of the service is seen at once, the same one is not sent again.
    assert reply.headers["cache-control"] == "no-cache"
    again = client.get(path, **{"If-None-Match": reply.headers["etag"]})
    assert (again.status, again.content) == (304, b"")
    assert client.get(path, **{"If-None-Match": '"other"'}).status == 200


def test_users(client: Client, library: Retriever) -> None:
    answer = client.get("/demo/users?prefix=1&limit=4").json
    assert answer == {"generation": "g1", "users": find_users(library.generation, "1", 4)}
    assert len(answer["users"]) == 4
    assert len(client.get("/demo/users").json["users"]) == 10


def test_histories(client: Client, library: Retriever) -> None:
    answer = client.get("/demo/users/7/history").json
    assert answer == {"generation": "g1", "user_id": "7", **asdict(user_history(library.generation, "7"))}
    assert len(answer["items"]) > 3
    assert set(answer["items"][0]) == {"item_id", "title", "time", "weight"}


@pytest.mark.parametrize("text", ["title 1", "TITLE", "1007", "<img", "‮", "nothing at all"])
def test_items(client: Client, library: Retriever, text: str) -> None:
    answer = client.get(f"/demo/items?query={quote(text)}&limit=7").json
    expected = [asdict(item) for item in find_items(library.generation, text, 7)]
    assert answer == {"generation": "g1", "items": expected}
    assert bool(expected) == (text != "nothing at all")


def test_values(client: Client, library: Retriever) -> None:
    answer = client.get("/demo/values").json
    assert answer == {"generation": "g1", "values": library.generation.attributes.frequent(24)}
    assert set(answer["values"]["genres"]) == {"Comedy", "Drama", "Horror", "War"}


def test_the_shop_has_hostile_titles(client: Client) -> None:
    found = [client.get(f"/demo/items?query={1000 + number}").json["items"] for number in HOSTILE_TITLES]
    assert [items[0]["title"] for items in found] == list(HOSTILE_TITLES.values())


@pytest.mark.parametrize("demo", [True, False])
def test_the_demo_can_be_left_out(shop: Shop, demo: bool) -> None:
    """Through all that carries the argument, in this process."""
    application: Any = build(BuildArgs(store=str(shop.config.store), demo=demo))
    deployment: Any = deployments.Retrieval
    # Without Ray's wrapper around it, which has a life of its own.
    own = next(c for c in deployment.func_or_class.__mro__ if "__serve_build_asgi_app__" in vars(c))
    made = own(*application._bound_deployment.init_args)
    api = made.__serve_build_asgi_app__()

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://demo") as session:
            paths = [*FILES, "/demo/users", "/demo/users/5/history", "/demo/items?query=1007", "/demo/values"]
            return [await session.get(path) for path in [*paths, "/v1/generation"]]

    *replies, generation = asyncio.run(ask())
    assert generation.json()["id"] == "g1"
    assert {reply.status_code for reply in replies} == {200 if demo else 404}
    for reply in replies:
        if not demo:
            assert reply.json()["error"]["code"] == "no_such_path"
            assert "POST /v1/retrieve" in reply.json()["error"]["allowed"]

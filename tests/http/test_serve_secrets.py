"""The token, and what a failure may say, on the application without a server."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from serve.api import make_api
from serve.fused import Service
from serve.middleware import MIN_TOKEN_LENGTH, OPEN, read_token
from tests.http.asgi import ask
from tests.http.limited import make_service, retrieve
from twotower.errors import ConfigError
from twotower.retrieval.retriever import Retriever

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def service(library: Retriever) -> Service:
    return make_service(library)


def test_only_the_token_opens_what_is_not_open(service: Service) -> None:
    api = make_api(service, token=TOKEN)
    good = [("Authorization", f"Bearer {TOKEN}")]
    bad: list[list[tuple[str, str]]] = [
        [],
        [("Authorization", "")],
        [("Authorization", TOKEN)],
        [("Authorization", "Bearer")],
        [("Authorization", f"Basic {TOKEN}")],
        [("Authorization", f"Bearer {TOKEN[:-1]}")],
        [("Authorization", f"Bearer {TOKEN}x")],
        [("Authorization", f"Bearer {TOKEN.upper()}")],
        [("Authorization", "Bearer \u00e4")],
        [*good, *good],
        [("X-Token", TOKEN)],
    ]

    async def run() -> None:
        for headers in bad:
            for method, path in (
                ("POST", "/v1/retrieve"),
                ("POST", "/v1/retrieve/batch"),
                ("GET", "/v1/generation"),
                ("GET", "/v1/items/1003/similar"),
                ("GET", "/v1/nothing"),
                ("GET", "/demo/users"),
                ("GET", "//v1/generation"),
            ):
                # The body is not read: it would not end.
                answer = await ask(api, method, path, [b"{"], headers, whole=False)
                assert answer.status == 401, (headers, path)
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert answer.headers["x-request-id"]
                assert answer.error["code"] == "unauthorized"
                assert TOKEN not in answer.content.decode()
        for headers in (good, [("authorization", f"bearer  {TOKEN}")]):
            assert (await retrieve(api, headers=headers)).status == 200
            assert (await ask(api, "GET", "/v1/generation", headers=headers)).status == 200
        for path in OPEN:
            assert (await ask(api, "GET", path)).status in (200, 404)
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert (await ask(api, "GET", path)).status == 200
        # Served at a prefix, the same paths are open.
        assert (await ask(api, "GET", "/shop/healthz", root_path="/shop")).status == 200
        assert (await ask(api, "GET", "/shop/v1/generation", root_path="/shop")).status == 401
        document = json.loads((await ask(api, "GET", "/openapi.json")).content)
        assert document["paths"]["/v1/retrieve"]["post"]["security"] == [{"token": []}]
        assert "401" in document["paths"]["/v1/retrieve"]["post"]["responses"]
        assert "security" not in document["paths"]["/healthz"]["get"]

    asyncio.run(run())


def test_files_of_a_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert read_token(path) == TOKEN
    for content, message in (
        (b"", "holds no token"),
        (b"short", f"at least {MIN_TOKEN_LENGTH}"),
        (b"two words that are long enough", "holds no token"),
        (b"two\nlines-that-are-long-enough", "holds no token"),
        ("\u00e4".encode() * 20, "not ASCII"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as error:
            read_token(path)
        assert not content or content.decode() not in str(error.value)
    with pytest.raises(ConfigError, match="can not be read"):
        read_token(tmp_path / "nothing")


@pytest.mark.parametrize("log_user_ids", [False, True])
def test_a_failure_says_nothing_about_the_request(
    library: Retriever,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    log_user_ids: bool,
) -> None:
    service = make_service(library)
    api = make_api(service, log_user_ids=log_user_ids)

    class Broken:
        usual_ms = 0.0

        def usual(self, query: Any) -> bool:
            return True

        def retrieve(self, query: Any) -> Any:
            raise RuntimeError(f"no row for user {query.user_id}") from KeyError(query.user_id)

    monkeypatch.setattr(service, "_front", Broken())
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "level", logging.WARNING)
    answer = asyncio.run(retrieve(api, parts=[b'{"k": 3, "user_id": "marker-7781"}']))
    assert answer.status == 500
    assert answer.error == {
        "code": "internal_error",
        "message": "the service failed to answer; the reason is in its log",
        "allowed": "try again",
        "details": [],
    }
    assert answer.headers["x-request-id"]
    assert "a request failed" in caplog.text
    assert "RuntimeError" in caplog.text
    assert "in retrieve" in caplog.text
    assert ("marker-7781" in caplog.text) == log_user_ids

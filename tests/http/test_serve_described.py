"""Items of a request's history that the model was not trained with, over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from serve.api import make_api
from serve.fused import FusedService
from tests import planted
from tests.http.asgi import ask
from twotower.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """A service of a trained model, to whose catalogue items of both genres were added."""
    path = planted.build_store(planted.make_config(tmp_path_factory.mktemp("planted")))[1]
    service = FusedService(Retriever.open(path), 40, 1, {"active": {}, "missing": {}})
    yield make_api(service)
    service.close()


def post(api: FastAPI, body: Any, path: str = "/v1/retrieve") -> tuple[int, Any]:
    answer = asyncio.run(ask(api, "POST", path, parts=[json.dumps(body).encode()]))
    return answer.status, json.loads(answer.content)


@pytest.mark.parametrize("genre", planted.GENRES)
def test_a_new_item_changes_the_answer_in_the_direction_of_its_genre(api: FastAPI, genre: str) -> None:
    entries = [
        f"new-{genre.lower()}",
        {"item_id": "nobody knows it", "features": {"genre": genre}, "weight": 0.5},
    ]
    for entry in entries:
        status, answer = post(api, {"k": 10, "history": [entry], "fields": ["genre"]})
        assert status == 200
        assert [item["genre"] for item in answer["items"]] == [genre] * 10
        assert answer["strategy"] == "history"
        assert answer["history"] == {"by_id": 0, "by_features": 1, "ignored": 0}


def test_the_answer_says_what_the_history_was_read_by(api: FastAPI) -> None:
    known = ["i0", {"item_id": "new-horror"}, "who?", {"item_id": 5, "features": None}]
    status, answer = post(api, {"k": 3, "history": known})
    assert status == 200
    assert answer["history"] == {"by_id": 1, "by_features": 1, "ignored": 2}
    _, answer = post(api, {"k": 3, "user_id": "u1"})
    assert answer["history"] == {"by_id": 12, "by_features": 0, "ignored": 0}
    requests = [{"k": 3, "history": ["who?"]}, {"k": 3, "history": known}]
    _, batch = post(api, {"requests": requests}, "/v1/retrieve/batch")
    assert [a["history"]["ignored"] for a in batch["answers"]] == [1, 2]


@pytest.mark.parametrize(
    ("features", "where", "said"),
    [
        ("Horror", "history[0].features", "is not allowed"),
        ({"genre": [["Horror"]]}, "history[0].features", "is nested more than a list deep"),
        ({"genre": {"is": "Horror"}}, "history[0].features", "is nested more than a list deep"),
        ({"colour": "red"}, "", "history[0].features: the model reads no item column 'colour'"),
        ({"genre": ["Horror"]}, "", "history[0].features: 'genre' has the value"),
    ],
)
def test_features_that_are_not_allowed(api: FastAPI, features: Any, where: str, said: str) -> None:
    status, answer = post(api, {"k": 3, "history": [{"item_id": "x", "features": features}]})
    assert status == 422
    error = answer["error"]
    assert said in error["message"]
    assert error["allowed"]
    assert [d["where"] for d in error["details"]] == ([where] if where else [])

"""The OpenAPI document is valid and true: generated requests never get what it does not say."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from openapi_spec_validator import validate
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.http.conftest import Client

OPERATIONS = [
    ("POST", "/v1/retrieve", 40),
    ("POST", "/v1/retrieve/batch", 15),
    ("GET", "/v1/items/{item_id}/similar", 30),
    ("GET", "/v1/generation", 1),
    ("GET", "/healthz", 1),
    ("GET", "/readyz", 1),
]
STRING, NUMBER, NULL = {"type": "string"}, {"type": "number"}, {"type": "null"}


@pytest.fixture(scope="module")
def document(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json
    return found


def test_the_document_is_valid_and_whole(document: dict[str, Any]) -> None:
    validate(document)
    described = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
        if path in {path for _, path, _ in OPERATIONS}
    }
    assert described == {(method, path) for method, path, _ in OPERATIONS}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            for status, answer in operation["responses"].items():
                assert "X-Request-ID" in answer["headers"], (path, status)
                assert ("Retry-After" in answer["headers"]) == (status == "503")


def test_not_ready_is_no_overload(document: dict[str, Any]) -> None:
    def code(path: str, method: str) -> str:
        answer = document["paths"][path][method]["responses"]["503"]
        found: str = answer["content"]["application/json"]["example"]["error"]["code"]
        return found

    assert (code("/readyz", "get"), code("/v1/retrieve", "post")) == ("not_ready", "overloaded")


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "components": document["components"]}


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in OPERATIONS])
def test_every_example_is_what_its_schema_says(document: dict[str, Any], method: str, path: str) -> None:
    operation = document["paths"][path][method.lower()]
    checked = 0
    for answer in operation["responses"].values():
        content = answer["content"]["application/json"]
        jsonschema.validate(content["example"], resolved(document, content["schema"]))
        checked += 1
    assert checked == len(operation["responses"]) >= 2
    if method == "POST":
        content = operation["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            jsonschema.validate(example["value"], resolved(document, content["schema"]))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"k": 0}, resolved(document, content["schema"]))


def test_the_examples_of_requests_are_answered(client: Client, document: dict[str, Any]) -> None:
    for path in ("/v1/retrieve", "/v1/retrieve/batch"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["examples"]
        for example in content["examples"].values():
            reply = client.send("POST", path, example["value"], {"Content-Type": "application/json"})
            assert reply.status == 200, reply.content


def with_facts_of_the_generation(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with what depends on the generation, so that all that it allows is answered."""
    request = document["components"]["schemas"]["RetrieveRequest"]["properties"]
    fields = ["title", "genres", "year"]
    request["fields"]["items"] = {"enum": fields}
    request["features"] = {
        "type": "object",
        "properties": {"age": {"anyOf": [NUMBER, NULL]}, "group": {"anyOf": [STRING, NULL]}},
        "additionalProperties": False,
    }
    some = {"type": "array", "items": STRING, "minItems": 1, "maxItems": 5}
    (listed,) = (kind for kind in request["history"]["anyOf"] if kind.get("type") == "array")
    (described,) = (kind for kind in listed["items"]["anyOf"] if kind.get("type") == "object")
    described["properties"]["features"] = {
        "type": "object",
        "properties": {
            "genres": {"anyOf": [some, NULL]},
            "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
        },
        "additionalProperties": False,
    }
    predicates = {
        "type": "object",
        "properties": {
            "genres": {
                "type": "object",
                "properties": {"any_of": some, "none_of": some},
                "additionalProperties": False,
                "minProperties": 1,
            },
            "year": {
                "type": "object",
                "properties": {"gte": {"type": "integer"}, "lt": {"type": "integer"}},
                "additionalProperties": False,
                "minProperties": 1,
            },
        },
        "additionalProperties": False,
    }
    request["filter"] = {"anyOf": [predicates, NULL]}
    for parameter in document["paths"]["/v1/items/{item_id}/similar"]["get"]["parameters"]:
        if parameter["name"] == "item_id":
            parameter["schema"] = {"enum": ["1003", "1007", "none"]}
        elif parameter["name"] == "fields":
            parameter["schema"] = {"enum": ["title", "year,genres", ""]}
        elif parameter["name"] == "filter":
            parameter["content"]["application/json"]["schema"] = predicates
    return document


def holds_whole_fraction(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(holds_whole_fraction, value.values()))
    if isinstance(value, list):
        return any(map(holds_whole_fraction, value))
    return isinstance(value, float) and value.is_integer()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path", "examples"), OPERATIONS)
def test_generated_requests_get_what_the_document_says(
    client: Client, method: str, path: str, examples: int, mode: schemathesis.GenerationMode
) -> None:
    negative = mode is schemathesis.GenerationMode.NEGATIVE
    if negative and examples == 1:
        pytest.skip("the route takes nothing that could be wrong")
    document = client.get("/openapi.json").json
    if not negative:
        document = with_facts_of_the_generation(document)
    operation = schemathesis.openapi.from_dict(document)[path][method]
    statuses: Counter[int] = Counter()

    @seed(5)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        # To JSON Schema 5.0 is an integer; here it is none, and no schema can say so.
        assume(not holds_whole_fraction(case.body))
        answer = case.call(base_url=client.url, timeout=30)
        statuses[answer.status_code] += 1
        excluded = []
        if answer.status_code == 504:
            # A generated deadline may be a millisecond; then this is the answer that is documented.
            assert answer.json()["error"]["code"] == "deadline_exceeded"
            assert int(case.headers["X-Deadline-Ms"]) < 1000
            answer.status_code = 422
            excluded += [positive_data_acceptance]
        if answer.status_code == 413:
            excluded += [negative_data_rejection]
        case.validate_response(answer, excluded_checks=excluded)

    ask()
    assert sum(statuses.values()) >= examples
    if negative:
        assert not statuses[200]
        assert statuses[422] >= examples // 3
    else:
        assert statuses[200] >= examples // 3

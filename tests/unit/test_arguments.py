"""Arguments of the Serve application that are not allowed, in words of ours."""

from __future__ import annotations

from typing import Any

import pytest

from serve.arguments import BuildArgs
from twotower.errors import ConfigError


def test_a_command_line_gives_text() -> None:
    arguments = BuildArgs.model_validate({"store": "s", "threads": "2", "demo": "false", "poll_s": "0.5"})
    assert (arguments.threads, arguments.demo, arguments.poll_s) == (2, False, 0.5)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "store: it is missing; give text"),
        ({"store": "s", "threads": "0"}, r"threads: must be an integer of at least 1 \(got '0'\)$"),
        ({"store": "s", "stor": "s"}, "stor: there is no such key; did you mean 'store'"),
        (
            {"store": "s", "limits": {"max_batchs": 3}},
            "limits.max_batchs: there is no such key; did you",
        ),
        ({"store": "s", "topology": "shard"}, "topology: must be one of fused, sharded .got 'shard'.; did"),
        ({"store": "s", "num_replicas": 3, "max_replicas": 2}, r"max_replicas \(2\) must be at least"),
    ],
)
def test_what_is_not_allowed_is_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(
        ConfigError, match=f"the arguments of the application are not valid: {says}"
    ) as caught:
        BuildArgs.model_validate(values)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)

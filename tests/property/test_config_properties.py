"""What holds for every key of the configuration, and for every text that is given to it."""

from __future__ import annotations

import copy
import math
import re
from typing import Any, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.config_keys import every_key
from twotower.config import load_config, parse_config, put_value
from twotower.config.keys import Kinds, bare
from twotower.errors import ConfigError

KEYS = {key: (kinds, needs) for key, kinds, needs in every_key()}
TEXTS = sorted(key for key, (kinds, _) in KEYS.items() if str in map(bare, kinds))
FOREIGN = re.compile(
    r"Input|Field required|should be|should have|should match|valid (string|integer|number|dict|list|bool)"
    r"|pydantic|validation error|Literal|NoneType|\bNone\b|\bTrue\b|\bFalse\b"
)
"""Words of pydantic and of Python, which no person has to know."""

WORDS = ["on", "off", "1e3", "0x10", "010", "1_000", "12:30:00", "2024-01-01"]
AWKWARD = st.sampled_from(
    [
        *WORDS,
        *"#'\"[]{}&*!%@`?-~= \t\n\r\\\ufeff\x85\u2028\x07a",
        ": ",
        ", ",
        "---",
        "...",
        "<<",
        "null",
        "yes",
        "no",
    ]
)
TEXT = st.one_of(
    st.lists(AWKWARD, max_size=6).map("".join),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
)


def value_at(config: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(config, list):
            config = config[int(part)]
        else:
            config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def test_the_keys_are_those_of_all_sections():
    for key in (
        "name",
        "data.source.columns.user",
        "features.query.0.name",
        "train.metrics.mlflow.experiment",
    ):
        assert key in TEXTS
    assert len(KEYS) > 150


@given(key=st.sampled_from(TEXTS), text=TEXT)
def test_a_text_given_by_set_arrives_unchanged_or_is_refused_with_the_reason(key: str, text: str):
    _, needs = KEYS[key]
    refusal = None
    try:
        config = load_config(None, [*needs, f"{key}={text}"])
    except ConfigError as error:
        refusal = str(error)
    if refusal is None:
        assert value_at(config, key) == (None if text == "null" else text)
    else:
        assert key in refusal or repr(text) in refusal
        assert not FOREIGN.search(refusal.replace(repr(text), ""))


@given(text=TEXT)
def test_no_text_is_refused_where_any_is_allowed(text: str):
    if text == "null" or re.fullmatch(r"""\s*(".*"|'.*')\s*""", text, re.DOTALL):
        return
    assert load_config(None, [f"storage.root={text}"]).storage.root == text
    assert load_config(None, [f"data.cache={text}"]).data.cache == text


def wrong_values(kinds: Kinds) -> list[Any]:
    plain = {bare(kind) for kind in kinds}
    if Any in plain:
        return []
    origins = {get_origin(kind) for kind in plain}
    wrong: list[Any] = [object, math.inf, math.nan]
    wrong += [] if dict in origins else [{"a": {"b": 1}}]
    wrong += [] if list in origins else [["a"], []]
    wrong += [] if type(None) in plain else [None]
    wrong += [] if bool in plain else [True]
    wrong += [] if str in plain else ["zzz", ""]
    wrong += [] if float in plain else [1.5]
    wrong += [] if plain & {int, float} else [3]
    return [*wrong, -(10**30), 10**30]


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_value_of_any_key_is_explained_in_one_line_of_ours(key: str):
    kinds, needs = KEYS[key]
    values: dict[str, Any] = {}
    for need in needs:
        name, _, text = need.partition("=")
        put_value(values, name, yaml.safe_load(text), "--set")
    for wrong in wrong_values(kinds):
        changed = copy.deepcopy(values)
        put_value(changed, key, wrong, "--set")
        message = None
        try:
            config = parse_config(changed)
        except ConfigError as error:
            message = str(error)
        if message is None:
            # Numbers without an upper bound take any.
            assert isinstance(wrong, int)
            assert abs(wrong) == 10**30
            assert math.isclose(value_at(config, key), wrong)
        else:
            assert "\n" not in message
            assert not FOREIGN.search(message)
            assert key.rpartition(".")[0] in message


def test_an_unknown_key_anywhere_has_its_nearest_name():
    for key, (_, needs) in KEYS.items():
        section, _, name = key.rpartition(".")
        misspelt = f"{section}.{name}x" if section else f"{name}x"
        with pytest.raises(ConfigError, match=rf"{re.escape(misspelt)}: .*did you mean '{name}'") as caught:
            load_config(None, [*needs, f"{misspelt}=1"])
        assert "\n" not in str(caught.value)

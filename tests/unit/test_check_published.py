"""What is said of the published generation before a service is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.checks import check_published
from tests.following import damage
from twotower.config import Config, parse_config
from twotower.errors import ArtefactError
from twotower.generations.store import Store


@pytest.fixture
def config(store: Store, tmp_path: Path, filled: Config) -> Config:
    """A configuration of the store of this test."""
    values = filled.to_json()
    values["storage"]["root"] = str(tmp_path)
    found = parse_config(values)
    assert found.store == store.root
    return found


def test_nothing_is_said_of_what_is_whole(
    store: Store, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    store.publish("a", "CANDIDATE")
    check_published(config, "CANDIDATE")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ArtefactError, match="nothing is published"):
        check_published(config)


def test_what_is_damaged_is_an_error_where_nothing_can_answer_in_its_place(
    store: Store, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    store.publish("a")
    damage(store.path("a") / "popularity.npy")
    with pytest.raises(ArtefactError, match=r"popularity.npy is damaged"):
        check_published(config)
    store.publish("b", expected="a")
    check_published(config)
    assert not capsys.readouterr().err
    damage(store.path("b") / "popularity.npy")
    check_published(config)
    said = capsys.readouterr().err
    assert "warning" in said
    assert "b/popularity.npy is damaged" in said
    assert "what CURRENT named before answers" in said

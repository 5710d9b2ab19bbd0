"""Passwords and tokens: hidden in what is stored, printed and raised; the rest of a text stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.forgetting import files_with
from tests.generations import plain_generation
from tests.shop import fresh_checkpoint, make_config, write_files
from twotower.config import parse_config
from twotower.data.prepare import prepare
from twotower.data.sources.download import fetch_zip
from twotower.errors import ConfigError, DownloadError, RefusedError
from twotower.progress import say
from twotower.redaction import redacted, redacted_values

SECRET = "hunter2-Qx9"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://user:{SECRET}@host:5000/path?x=1", "https://***@host:5000/path?x=1"),
        (f"https://{SECRET}@host/path", "https://***@host/path"),
        (f"redis://:{SECRET}@10.0.0.1:6379/0", "redis://***@10.0.0.1:6379/0"),
        (f"rediss://default:{SECRET}@h", "rediss://***@h"),
        (f"postgresql+psycopg2://u:{SECRET}@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        (f"https://u:p@{SECRET}@host/x", "https://***@host/x"),
        (f"https://u:p/{SECRET}@host/x", "https://***@host/x"),
        (f"HTTPS://U:{SECRET}@HOST", "HTTPS://***@HOST"),
        (f"http://h/a?token={SECRET}&b=1", "http://h/a?token=***&b=1"),
        (f"http://h/a?b=1&X-Amz-Signature={SECRET}", "http://h/a?b=1&X-Amz-Signature=***"),
        (f"https://h/a?sig={SECRET}#end", "https://h/a?sig=***#end"),
        (f"Server=db;Password={SECRET};Port=1", "Server=db;Password=***;Port=1"),
        (f"api_key = {SECRET}", "api_key = ***"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"two: http://a:{SECRET}@h and ftp://b:{SECRET}@i!", "two: http://***@h and ftp://***@i!"),
    ],
)
def test_what_is_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://mlflow.example.com:5000/path@2/x",
        "s3://bucket/prefix",
        "mail me@example.com",
        "runs/movielens",
        "file:///tmp/a@b",
        "--set serve.token_file=/etc/token",
        "k=20, at=2026",
        "user_id: 'a@b.c' is no id",
    ],
)
def test_what_stays(text: str) -> None:
    assert redacted(text) == text


@given(
    st.sampled_from(["http", "https", "redis", "mysql+pymysql"]),
    st.text("abcXYZ019%._~!$&'()*+,;=-", min_size=0, max_size=8),
    st.sampled_from(["h", "h:80", "10.0.0.1:6379/0", "h/p?q=1"]),
)
def test_no_user_or_password_of_a_url_survives(scheme: str, user: str, host: str) -> None:
    found = redacted(f"see {scheme}://{user.replace(chr(39), '')}:{SECRET}@{host} there")
    assert SECRET not in found
    assert host in found


def test_errors_lines_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"https://u:{SECRET}@h"
    for error in (ConfigError(f"{url} takes no metrics"), RefusedError(url)):
        assert SECRET not in str(error)
        assert "h" in str(error)
    say(f"downloading {url}")
    assert SECRET not in capsys.readouterr().err
    assert redacted_values({"a": [url, 1, None, {"b": url}]}) == {
        "a": ["https://***@h", 1, None, {"b": "https://***@h"}]
    }


def test_nothing_beside_an_artefact_holds_a_password(tmp_path: Path) -> None:
    write_files(tmp_path / "files")
    values: dict[str, Any] = make_config(tmp_path).to_json()
    values["train"]["metrics"]["mlflow"] = {"tracking_uri": f"https://user:{SECRET}@host:5000"}
    values["data"]["mirror"] = f"https://user:{SECRET}@mirror"
    config = parse_config(values)
    # Who trains needs it.
    assert SECRET in json.dumps(config.to_json())
    dataset = prepare(config)
    checkpoint = fresh_checkpoint(config, dataset, config.checkpoints / "c")
    plain_generation(config, dataset, checkpoint, "g1")
    assert files_with(tmp_path / "runs", SECRET) == set()
    stored = json.loads((config.checkpoints / "c" / "config.json").read_bytes())
    assert stored["train"]["metrics"]["mlflow"]["tracking_uri"] == "https://***@host:5000"
    assert parse_config(stored).model == config.model


def test_a_mirror_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DownloadError, match=r"http://\*\*\*@127\.0\.0\.1:9/d\.zip") as caught:
        fetch_zip("d.zip", "", f"http://u:{SECRET}@127.0.0.1:9", tmp_path)
    assert SECRET not in str(caught.value) + capsys.readouterr().err
    assert files_with(tmp_path, SECRET) == set()

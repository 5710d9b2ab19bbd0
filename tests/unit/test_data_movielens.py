from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.datasets import write_zip
from twotower.config import Config, parse_config
from twotower.data.dataset import Dataset
from twotower.data.prepare import prepare
from twotower.errors import DataError, DownloadError

FLAGS = 19


def config(tmp_path: Path, name: str, **data: Any) -> Config:
    values = {"source": {"kind": "movielens", "name": name}, "mirror": str(tmp_path), **data}
    return parse_config({"storage": {"root": str(tmp_path / "runs")}, "data": values})


def ratings(num_users: int = 3, per_user: int = 10) -> list[tuple[int, int, float, int]]:
    """user, item, rating, second; the file is in reverse order of time."""
    rows = [
        (u + 1, 10 + (n + u) % 12, float(1 + (u + n) % 5), 800_000_000 + 100 * n + u)
        for u in range(num_users)
        for n in range(per_user)
    ]
    return rows[::-1]


def flags(*on: int) -> str:
    return "|".join("1" if at in on else "0" for at in range(FLAGS))


def ml_100k(tmp_path: Path) -> None:
    items = [f"{i}|Caf\xe9 {i} (19{50 + i})|01-Jan-1995||http://x|{flags(5, 8)}" for i in range(10, 21)]
    items.append(f"21|unknown||||{flags(0)}")
    write_zip(
        tmp_path / "ml-100k.zip",
        {
            "ml-100k/u.data": "".join(f"{u}\t{i}\t{int(r)}\t{t}\n" for u, i, r, t in ratings()),
            "ml-100k/u.item": "\n".join(items).encode("iso-8859-1"),
            "ml-100k/u.user": "1|24|M|technician|85711\n2|53|F|other|94043\n3|23|M|writer|32067\n",
        },
    )


def ml_1m(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "ml-1m.zip",
        {
            "ml-1m/ratings.dat": "".join(f"{u}::{i}::{int(r)}::{t}\n" for u, i, r, t in ratings()),
            "ml-1m/movies.dat": "".join(
                f"{i}::Caf\xe9: {i} (1994)::Comedy|Drama\n" for i in range(10, 22)
            ).encode("iso-8859-1"),
            "ml-1m/users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n",
        },
    )


def ml_10m(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "ml-10m.zip",
        {
            "ml-10M100K/ratings.dat": "".join(f"{u}::{i}::{r - 0.5}::{t}\n" for u, i, r, t in ratings()),
            "ml-10M100K/movies.dat": "".join(f"{i}::Café {i} (1994)::Comedy\n" for i in range(10, 22)),
            "ml-10M100K/tags.dat": "1::10::a::5\n",
        },
    )


def ml_csv(tmp_path: Path, name: str) -> None:
    movies = [f'{i},"Café, The {i} (1994)",Comedy|Drama' for i in range(10, 21)]
    movies.append("21,No Year,(no genres listed)")
    write_zip(
        tmp_path / f"{name}.zip",
        {
            f"{name}/ratings.csv": "userId,movieId,rating,timestamp\n"
            + "".join(f"{u},{i},{r - 0.5},{t}\n" for u, i, r, t in ratings()),
            f"{name}/movies.csv": "\n".join(["movieId,title,genres", *movies]) + "\n",
        },
    )


def check(dataset: Dataset, low: float, high: float, shift: float) -> None:
    """Every rating is there, by user and time, weighted over the declared scale."""
    expected = sorted((u, t, i, r - shift) for u, i, r, t in ratings())
    interactions = dataset.interactions
    # The file is in reverse order, so the user that is seen first is the last one.
    assert dataset.user_ids.ids(range(3)) == ["3", "2", "1"]
    found = sorted(
        zip(
            [int(i) for i in dataset.user_ids.ids(interactions.user_row)],
            (interactions.time // 1_000_000).tolist(),
            [int(i) for i in dataset.item_ids.ids(interactions.item_row)],
            interactions.weight.tolist(),
            strict=True,
        )
    )
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    scaled = [(r - low) / (high - low) for *_, r in expected]
    assert [row[3] for row in found] == pytest.approx(scaled, abs=1e-6)
    assert len(set(scaled)) == 5
    assert dataset.manifest["raw"]["official"] is False
    assert len(dataset.manifest["raw"]["sha256"]) == 64


def test_ml_100k(tmp_path: Path) -> None:
    ml_100k(tmp_path)
    dataset = prepare(config(tmp_path, "ml-100k", positives={"weight": "scaled"}))
    check(dataset, 1, 5, 0)
    items = dataset.item_table()
    first = {"item_id": "10", "title": "Café 10 (1960)", "genres": "Comedy|Drama", "year": 1960}
    assert items.slice(0, 1).to_pylist() == [first]
    assert items.slice(11).to_pylist() == [
        {"item_id": "21", "title": "unknown", "genres": None, "year": None}
    ]
    user = {"user_id": "2", "age": "53", "gender": "F", "occupation": "other", "zip": "94043"}
    assert dataset.user_table().slice(1, 1).to_pylist() == [user]


def test_ml_1m(tmp_path: Path) -> None:
    ml_1m(tmp_path)
    dataset = prepare(config(tmp_path, "ml-1m", positives={"weight": "scaled"}))
    check(dataset, 1, 5, 0)
    first = {"item_id": "10", "title": "Café: 10 (1994)", "genres": "Comedy|Drama", "year": 1994}
    assert dataset.item_table().slice(0, 1).to_pylist() == [first]
    user = {"user_id": "3", "gender": "M", "age": "25-34", "occupation": "15", "zip": "55117"}
    assert dataset.user_table().slice(0, 1).to_pylist() == [user]


def test_ml_10m(tmp_path: Path) -> None:
    ml_10m(tmp_path)
    dataset = prepare(config(tmp_path, "ml-10m", positives={"weight": "scaled"}))
    check(dataset, 0.5, 5, 0.5)
    assert dataset.item_table(["title"]).column("title")[0].as_py() == "Café 10 (1994)"
    assert dataset.user_table().column_names == ["user_id"]


@pytest.mark.parametrize("name", ["ml-20m", "ml-25m", "ml-32m", "ml-latest-small", "ml-latest"])
def test_csv_layout(tmp_path: Path, name: str) -> None:
    ml_csv(tmp_path, name)
    dataset = prepare(config(tmp_path, name, positives={"weight": "scaled"}))
    check(dataset, 0.5, 5, 0.5)
    rows = dataset.item_table().to_pylist()
    assert rows[0] == {
        "item_id": "10",
        "title": "Café, The 10 (1994)",
        "genres": "Comedy|Drama",
        "year": 1994,
    }
    assert rows[11] == {"item_id": "21", "title": "No Year", "genres": None, "year": None}


def test_separators_that_straddle_read_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from twotower.data.sources import csv_files

    ml_1m(tmp_path)
    whole = prepare(config(tmp_path, "ml-1m")).fingerprint
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 37)
    assert prepare(config(tmp_path, "ml-1m", repeats="first")).fingerprint == whole


def test_the_wrong_zip_under_the_name_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "ml-1m.zip", {"ml-20m/ratings.csv": "a"})
    with pytest.raises(
        DownloadError, match=r"holds no ratings\.dat, so it is not ml-1m; it holds ml-20m/ratings\.csv"
    ):
        prepare(config(tmp_path, "ml-1m"))


def test_a_rating_that_is_no_number_is_counted_and_shown(tmp_path: Path) -> None:
    lines = [f"1::{i}::{4 if i % 2 else 'x'}::{800_000_000 + i}" for i in range(10, 22)]
    movies = "".join(f"{i}::T::Comedy\n" for i in range(10, 22))
    users = "1::F::1::10::48067\n"
    members = {"m/ratings.dat": "\n".join(lines), "m/movies.dat": movies, "m/users.dat": users}
    write_zip(tmp_path / "ml-1m.zip", members)
    with pytest.raises(
        DataError, match=r"6 rows can not be read .*\n  ratings.dat row 1: without a readable value: 'x'"
    ):
        prepare(config(tmp_path, "ml-1m"))
    assert prepare(config(tmp_path, "ml-1m", on_bad_rows="drop")).counts["bad_rows"] == 6


@pytest.mark.parametrize("member", ["ratings.csv", "movies.csv"])
def test_a_member_that_is_damaged_inside_a_complete_zip_is_named(tmp_path: Path, member: str) -> None:
    ml_csv(tmp_path, "ml-20m")
    path = tmp_path / "ml-20m.zip"
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"ml-20m/{member}")
    data = bytearray(path.read_bytes())
    at = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    data[at] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DownloadError, match=r"ml-20m\.zip is damaged"):
        prepare(config(tmp_path, "ml-20m"))


@pytest.mark.sockets
def test_a_later_job_needs_no_mirror_and_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("twotower.data.sources.movielens.OFFICIAL", "http://127.0.0.1:9/none")
    monkeypatch.delenv("TWOTOWER_MIRROR", raising=False)
    ml_1m(tmp_path)
    cache = str(tmp_path / "cache")
    prepared = prepare(config(tmp_path, "ml-1m", cache=cache))
    again = prepare(config(tmp_path, "ml-1m", cache=cache, mirror=None))
    assert again.path == prepared.path
    assert "which these settings gave before" in capsys.readouterr().err
    with pytest.raises(DownloadError):  # other settings, nothing prepared
        prepare(config(tmp_path, "ml-1m", cache=cache, mirror=None, repeats="first"))
    with pytest.raises(DownloadError):  # a mirror that is named must work
        prepare(config(tmp_path, "ml-1m", cache=cache, mirror=str(tmp_path / "absent")))

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twotower.data import vocabulary as module
from twotower.data.vocabulary import Vocabulary
from twotower.errors import ArtefactError, DataError


def vocabulary(*ids: str) -> Vocabulary:
    return Vocabulary(pa.array(ids, pa.string()))


def test_an_opened_vocabulary_answers_like_the_written_one(tmp_path: Path) -> None:
    written = vocabulary("b", "007", "ä€", "a", "7")
    written.write(tmp_path / "ids.arrow")
    opened = Vocabulary.open(tmp_path / "ids.arrow")
    assert opened.ids(range(5)) == ["b", "007", "ä€", "a", "7"]
    assert [opened.row(i) for i in ("007", "7", "ä€")] == [1, 4, 2]
    assert opened.hash == written.hash


def test_an_empty_vocabulary_can_be_written_and_asked(tmp_path: Path) -> None:
    vocabulary().write(tmp_path / "ids.arrow")
    opened = Vocabulary.open(tmp_path / "ids.arrow")
    assert len(opened) == 0
    assert opened.row("a") is None
    assert opened.rows(["a"], missing="negative").tolist() == [-1]


def test_missing_ids_are_an_error_or_minus_one() -> None:
    ids = vocabulary("a", "b", "c")
    assert ids.rows(["c", "x", "a"], missing="negative").tolist() == [2, -1, 0]
    assert ids.rows([]).dtype == np.int64
    with pytest.raises(DataError, match=r"1 of 3 ids are not in the vocabulary of 3: 'x'"):
        ids.rows(["c", "x", "a"])


@pytest.mark.parametrize("row", [-1, 3])
def test_negative_and_too_large_rows_are_refused(row: int) -> None:
    ids = vocabulary("a", "b", "c")
    with pytest.raises(IndexError, match=f"row {row} is not in 0..2"):
        ids.id(row)
    with pytest.raises(IndexError, match=f"row {row} is not in 0..2"):
        ids.ids([0, row])


def test_ids_with_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hash64", lambda text: len(text))
    ids = vocabulary("aa", "b", "cc", "dd", "e")
    assert ids.rows(["dd", "e", "aa", "b", "cc"]).tolist() == [3, 4, 0, 1, 2]
    assert ids.rows(["zz", "z", "zzz"], missing="negative").tolist() == [-1, -1, -1]
    assert ids.row("cc") == 2
    assert ids.row("zz") is None


def test_repeated_and_null_ids_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 ids are there more than once: 'a'"):
        vocabulary("a", "b", "a")
    with pytest.raises(DataError, match="no null ids"):
        Vocabulary(pa.array(["a", None]))


def test_the_hash_depends_on_order_and_boundaries_not_on_chunks() -> None:
    assert vocabulary("a", "b").hash != vocabulary("b", "a").hash
    assert vocabulary("ab", "c").hash != vocabulary("a", "bc").hash
    sliced = Vocabulary(pa.array(["x", "a", "b"]).slice(1))
    assert sliced.hash == vocabulary("a", "b").hash


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    vocabulary("a").write(tmp_path / "ids.arrow")
    (tmp_path / "ids.arrow").write_bytes((tmp_path / "ids.arrow").read_bytes()[:40])
    with pytest.raises(ArtefactError, match=r"ids\.arrow is not a readable vocabulary"):
        Vocabulary.open(tmp_path / "ids.arrow")


def test_a_forgotten_id_leaves_its_row_empty(tmp_path: Path) -> None:
    ids = vocabulary("a", "b", "c", "d").without([2]).without([0])
    ids.write(tmp_path / "ids.arrow")
    for each in (ids, Vocabulary.open(tmp_path / "ids.arrow"), ids.extended(["e"])):
        assert each.ids(range(4)) == ["", "b", "", "d"]
        assert each.forgotten.tolist() == [0, 2]
        assert each.rows(["a", "b", "", "d"], missing="negative").tolist() == [-1, 1, -1, 3]
        assert each.row("") is None
        assert "" not in each
    assert ids.hash != vocabulary("a", "b", "c", "d").hash
    with pytest.raises(DataError, match="'a', 'c'"):
        ids.rows(["a", "c"])

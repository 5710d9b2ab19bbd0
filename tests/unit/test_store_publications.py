"""The log of publications, what may be forced, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.generations import edit_index
from twotower.errors import ArtefactError, RefusedError
from twotower.generations.publications import LOG, Publication, append, earlier, read_log, reasons_against
from twotower.generations.store import Store


def entry(
    number: str, previous: str | None, action: str = "publish", pointer: str = "CURRENT"
) -> Publication:
    return Publication("2026-01-01T00:00:00+00:00", pointer, number, previous, action)


def test_the_log_says_what_was_published_when(store: Store) -> None:
    store.publish("a")
    store.publish("a")
    store.publish("b", pointer="candidate")
    store.publish("b")
    lines = [json.loads(line) for line in (store.root / LOG).read_text().splitlines()]
    assert [(x["pointer"], x["id"], x["previous"]) for x in lines] == [
        ("CURRENT", "a", None),
        ("candidate", "b", None),
        ("CURRENT", "b", "a"),
    ]
    assert all(x["time"].endswith("+00:00") and not x["forced"] and x["reasons"] == [] for x in lines)
    assert [x.to_json() for x in store.publications()] == lines
    assert store.pointers() == {"CURRENT": "b", "candidate": "b"}


def test_what_speaks_against_it_is_refused_and_recorded_when_forced(store: Store) -> None:
    edit_index(store.path("a"), index_recall=0.9, max_search_ms=0.5, search_ms={"p50": 0.75, "p99": 1.0})
    with pytest.raises(RefusedError) as error:
        store.publish("a", reasons=["the recall of users fell by 20%"])
    message = str(error.value)
    assert "0.9000" in message
    assert "takes 0.750 ms (median), index.max_search_ms is 0.5" in message
    assert "the recall of users fell by 20%" in message
    assert "--force" in message
    assert store.current() is None
    assert store.publications() == []
    store.publish("a", force=True, reasons=["the recall of users fell by 20%"])
    (only,) = store.publications()
    assert only.forced
    assert len(only.reasons) == 3
    assert only.reasons[2] == "the recall of users fell by 20%"
    # A reason of the caller alone is enough.
    with pytest.raises(RefusedError, match="fell by 30%"):
        store.publish("b", reasons=["it fell by 30%"])


def test_a_search_as_fast_as_allowed_is_published(store: Store) -> None:
    facts = {"index_recall": 1.0, "target_index_recall": 1.0, "search_ms": {"p50": 0.5, "p99": 9.0}}
    assert reasons_against({**facts, "max_search_ms": 0.5}) == []
    assert reasons_against({**facts, "max_search_ms": None}) == []
    assert reasons_against(facts) == []
    assert len(reasons_against({**facts, "max_search_ms": 0.49})) == 1


def test_rolling_back_undoes_publications_one_by_one(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.publish(name)
    store.publish("a", pointer="candidate")
    done = store.rollback()
    assert (done.id, done.previous, done.action) == ("b", "c", "rollback")
    assert store.current() == "b"
    assert store.rollback().id == "a"
    with pytest.raises(RefusedError, match="nothing to roll back to"):
        store.rollback()
    assert store.current() == "a"
    # What is published after it can be undone as well.
    store.publish("c")
    assert store.rollback().id == "a"
    with pytest.raises(RefusedError, match="never set"):
        store.rollback("other")
    assert store.current("candidate") == "a"


def test_nothing_is_rolled_back_to_what_is_gone_or_damaged(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.publish(name)
    path = store.path("b") / "popularity.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ArtefactError, match="popularity"):
        store.rollback()
    store.path("b").rename(store.path("x"))
    with pytest.raises(RefusedError, match="named b before c, and that was removed.*still there: a;"):
        store.rollback()
    assert store.current() == "c"


def test_a_line_that_never_took_effect_is_passed_over(store: Store) -> None:
    store.publish("a")
    store.publish("b")
    # Publishers killed between the log and the pointer, and in the middle of a line.
    append(store.root / LOG, entry("c", "b"))
    with open(store.root / LOG, "ab") as file:
        file.write(b'{"time": "2026')
    assert [e.id for e in store.publications()] == ["a", "b", "c"]
    assert store.rollback().id == "a"
    assert [(e.id, e.action) for e in store.publications()][-1] == ("a", "rollback")


def test_a_damaged_log_is_named(store: Store) -> None:
    for line in (b"{", b"{}", b"[]", b'{"time": 1, "pointer": 2}'):
        (store.root / LOG).write_bytes(line + b"\n")
        with pytest.raises(ArtefactError, match="line 1 of .*publications.jsonl"):
            store.publications()


@given(st.lists(st.sampled_from(["undo", "a", "b", "c", "d"]), max_size=30))
def test_any_sequence_is_undone_in_reverse(actions: list[str]) -> None:
    log: list[Publication] = []
    stack: list[str] = []
    for action in actions:
        # Another pointer does not matter.
        log.append(entry("z", None, pointer="candidate"))
        current = stack[-1] if stack else None
        if action == "undo":
            if len(stack) > 1:
                stack.pop()
                log.append(entry(stack[-1], current, "rollback"))
        elif action != current:
            stack.append(action)
            log.append(entry(action, current))
    if stack:
        assert earlier(log, "CURRENT", stack[-1], {}) == stack[-2::-1]


def test_an_append_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / LOG
    assert read_log(path) == []
    path.write_bytes(b'{"half')
    append(path, entry("a", None))
    append(path, entry("b", "a"))
    assert [e.id for e in read_log(path)] == ["a", "b"]

"""The page of a report: what it says, what it does without, and that other people's text stays text."""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import twotower.evaluation.page
from tests.report_content import GROUPS, HOSTILE, RANKERS, Page, full_content
from tests.unit.test_sweep import BATCH, TEMPERATURE, config_of, four_results
from twotower.evaluation.page.numbers import clean, mentioned, share, short
from twotower.evaluation.page.quality import metrics_of, verdict
from twotower.evaluation.page.render import page, write_page
from twotower.evaluation.page.sweep import sweep_page

FOLDER = Path(twotower.evaluation.page.__file__).parent


@pytest.fixture(scope="module")
def content():
    return full_content()


@pytest.fixture(scope="module")
def text(content):
    return page(content, {"name": HOSTILE})


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def changed(content, **changes):
    return {**copy.deepcopy(content), **changes}


def test_text_of_others_stays_text(parsed, text):
    scripts = parsed.all("script")
    assert [s.text for s in scripts] == [(FOLDER / "page.js").read_text()]
    assert parsed.all("img") == []
    for element in parsed.elements:
        # No attribute began inside a text: neither a handler nor anything that loads something.
        assert not {a for a in element.attributes if a.startswith("on") or a in ("src", "style", "action")}
        if "href" in element.attributes:
            assert re.fullmatch(r"#[a-z0-9-]+", element.attributes["href"])
    shown = clean(HOSTILE, 120)
    assert shown.startswith("</script><script>alert(1)</script><img src=x")
    assert [e.text for e in parsed.all("span", class_="title")].count(shown) == 2 * 7
    assert parsed.all("h1")[0].text == clean(HOSTILE, 60)
    assert any(shown[:70] in use.attributes["data-tip"] for use in parsed.all("use"))
    assert "\u202e" not in text
    assert "\x00" not in text


def test_a_title_does_not_end_a_tip(content):
    parsed = Page(page(changed(content, map={**content["map"], "titles": ["a\tb\nc"] * 400})))
    tips = [use.attributes["data-tip"] for use in parsed.all("use")]
    assert len(tips) == 400
    assert all(len(row.split("\t")) == 3 for tip in tips for row in tip.split("\n"))
    assert sum(tip.split("\n")[0].split("\t")[1] == "a b c" for tip in tips) == 400


def test_the_policy_lets_only_what_is_in_the_page_run(parsed):
    meta = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    rules = dict(rule.strip().split(" ", 1) for rule in meta.split(";"))

    def digest(value):
        return f"'sha256-{base64.b64encode(hashlib.sha256(value.encode()).digest()).decode()}'"

    assert rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": digest(parsed.all("style")[0].text),
        "script-src": digest(parsed.all("script")[0].text),
    }


def test_tables_hold_every_number(parsed, content):
    tables = parsed.tables()
    names = {"model": "Two towers", "ease": "EASE\u1d3f", "item_knn_cosine": "Item-kNN, cosine"}
    names |= {"popularity": "Popularity", "true_model": "True model"}
    for k in (10, 20, 100):
        heading, *rows = tables[f"Accuracy at {k}"]
        assert heading == ["ranker", "Recall", "NDCG"]
        values = content["metrics"]
        # The model first, the true model last, in between from the best down.
        order = ["model", "ease", "item_knn_cosine", "popularity", "true_model"]
        assert rows == [
            [names[r], f"{values[r][f'recall@{k}']:.4f}", f"{values[r][f'ndcg@{k}']:.4f}"] for r in order
        ]
    assert tables["The lists at 10"][0] == ["ranker", "Coverage", "Same top 10, users"]
    assert tables["By activity".replace("By", "NDCG@10 by")][1:] == [
        ["1 to 5", "20", *(f"{RANKERS[r] * 1.5:.4f}" for r in order)],
        ["over 5", "63", *(f"{RANKERS[r] * 1.5:.4f}" for r in order)],
    ]
    assert tables["Recall by k"][1][0] == "1"
    assert [row[1] for row in tables["Recall by k"][1:]] == [
        f"{v:.4f}" for v in content["recall_by_k"]["rankers"]["model"]
    ]
    assert ["p99", "4.75\u00a0ms"] in tables["Latency of single requests"]
    assert ["nprobe 8", "0.20\u00a0ms", "0.9700"] in tables["Index recall against search time"]
    assert ["4-9", "100", "50.0%", "75.0%"] in tables["Popularity: recommended against consumed"]
    minus = tables["NDCG@10: the model minus"]
    assert minus[1] == ["EASE\u1d3f", "+0.0300", "+0.0250 to +0.0350", "0.0002"]


def test_intervals_and_the_best_stand_in_the_table(parsed, content):
    table = parsed.all("table")[[t for t in parsed.tables()].index("Accuracy at 10")]
    small = [e.text for e in parsed.all("small", table)]
    assert small[0] == f"{0.12 * 0.9:.4f} to {0.12 * 1.1:.4f}"
    assert len(small) == 2 * len(RANKERS)
    # The true model is higher and no rival.
    assert [e.text for e in parsed.all("strong", table)] == ["0.1200", "0.1800"]


@pytest.mark.parametrize(
    ("low", "high", "ease", "tone", "headline"),
    [
        (0.02, 0.04, 0.1, "good", "1.20 times the NDCG@10 of EASE"),
        (-0.01, 0.04, 0.1, "even", "No better than EASE"),
        (None, None, 0.1, "good", "1.20 times the NDCG@10 of EASE"),
        (-0.08, -0.04, 0.16, "bad", "Below EASE\u1d3f: 0.75 times its NDCG@10"),
    ],
)
def test_the_verdict_names_the_best_baseline(content, low, high, ease, tone, headline):
    metrics = changed(content["metrics"])
    metrics["ease"] = {name: value * ease / 0.1 for name, value in metrics["ease"].items()}
    known = {"difference": 0.03, "low": low, "high": high, "p": 0.2}
    found = verdict_of(changed(content, metrics=metrics, differences={"ease": {"ndcg@10": known}}))
    assert found.tone == tone
    assert found.headline.startswith(headline)
    assert ("95% interval" in " ".join(found.sentences)) == (low is not None)


def verdict_of(content):
    return verdict(content, metrics_of(content))


def test_a_model_that_was_asked_for_is_the_rival(content):
    metrics = {**changed(content["metrics"]), "compared": {"ndcg@10": 0.09}}
    found = verdict_of(changed(content, metrics=metrics, differences={}))
    assert found.headline == "2.00 times the NDCG@10 of compared model"


def test_without_baselines_nothing_is_claimed(content):
    only = {"model": content["metrics"]["model"]}
    found = verdict_of(changed(content, metrics=only))
    assert (found.tone, found.headline) == ("even", "There is no baseline to compare with")


def test_a_report_may_lack_everything_but_the_metrics():
    bare = {"metrics": {"model": {"recall@5": 0.25}, "popularity": {"recall@5": 0.5}}}
    parsed = Page(page(bare))
    assert parsed.all("h2")[0].text == "Below popularity: 0.50 times its Recall@5"
    assert parsed.tables()["Accuracy at 5"] == [
        ["ranker", "Recall"],
        ["Two towers", "0.2500"],
        ["Popularity", "0.5000"],
    ]
    assert [a.attributes["href"] for a in parsed.all("a")][1:] == ["#quality", "#run"]
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", parsed.all("main")[0].text)


@pytest.mark.parametrize("key", sorted(full_content(20)))
def test_any_part_may_be_missing_or_null(content, key):
    without = {name: value for name, value in content.items() if name != key}
    if key != "metrics":
        assert Page(page(without)).all("h1")
        assert Page(page({**without, key: None})).all("h1")


def test_null_numbers_are_dashes(content):
    metrics = changed(content["metrics"])
    metrics["popularity"] = {**metrics["popularity"], "recall@10": None}
    rows = Page(page(changed(content, metrics=metrics))).tables()["Accuracy at 10"]
    assert next(row for row in rows if row[0] == "Popularity")[1] == "\u2013"


def test_every_chart_has_a_name_a_table_and_values(parsed, content):
    figures = parsed.all("figure", class_="chart")
    titles = [parsed.all("h3", f)[0].text for f in figures]
    assert titles == [
        "NDCG@10", "Recall@10", "Recall by k", "NDCG@10: the model minus", "Recall@10: the model minus",
        "By activity", "By genres", "Validation", "Training loss", "Temperature",
        "Index recall against search time", "Latency of single requests", "Item vectors by genres",
        "Popularity: recommended against consumed",
    ]  # fmt: skip
    for figure, title in zip(figures, titles, strict=True):
        drawing = parsed.all("svg", figure, role="img")[0]
        name = drawing.attributes["aria-label"]
        assert name.startswith(f"{title}. "), title
        assert len(name) > len(title) + 25, title
        targets = [e for e in parsed.elements if drawing in e.above and "data-tip" in e.attributes]
        assert targets, title
        # Without the script there is the element's own title.
        assert all(e.name == "use" or parsed.all("title", e) for e in targets)
    # All but the first two, whose values stand in the drawing, the tip and the table below.
    assert sum(bool(parsed.all("table", figure)) for figure in figures) == len(figures) - 2


def test_headings_go_down_one_by_one_and_ids_are_unique(parsed):
    levels = [int(e.name[1]) for e in parsed.elements if re.fullmatch(r"h[1-6]", e.name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [e.attributes["id"] for e in parsed.elements if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for anchor in parsed.all("a"):
        assert anchor.attributes["href"][1:] in ids
    for table in parsed.all("table"):
        assert all("scope" in e.attributes for e in parsed.all("th", table))
        assert parsed.all("caption", table)[0].text


def test_the_map_has_every_item_in_the_colour_of_its_group(parsed, content):
    groups = content["map"]["groups"]
    # The eight largest of nine groups; equal ones in the order in which they come.
    largest = sorted(set(groups) - {"other"}, key=lambda g: (-groups.count(g), groups.index(g)))[:8]
    for style, group in enumerate(largest):
        drawn = parsed.all("use", parsed.all("g", class_="group")[style])
        assert len(drawn) == groups.count(group)
    assert len(parsed.all("use")) == len(groups)
    places = {int(u.attributes["data-place"]): u for u in parsed.all("use")}
    x, y = content["map"]["x"], content["map"]["y"]
    drawn_x = np.array([float(places[i].attributes["x"]) for i in range(len(x))])
    drawn_y = np.array([float(places[i].attributes["y"]) for i in range(len(y))])
    assert np.corrcoef(x, drawn_x)[0, 1] > 0.9999
    assert np.corrcoef(y, drawn_y)[0, 1] < -0.9999
    assert len(GROUPS) == 10


def test_examples_stand_between_comments_with_the_key_of_their_user(parsed, text, content):
    keys = [e["key"] for e in content["examples"]]
    assert [c for c in parsed.comments if c.startswith("user ")] == [f"user {key}" for key in keys]
    for key in keys:
        inside = re.search(rf"<!--user {key}-->(.*?)<!--/user-->", text, re.DOTALL)
        assert inside is not None
        assert inside[1].count("<details") == inside[1].count("</details>") == 1
    ticks = parsed.all("span", class_="tick")
    assert len(ticks) == 2
    assert parsed.all("li", class_="hit-item")[0].text.startswith(clean(HOSTILE, 120))


def test_the_page_is_small_and_shows_the_configuration_beside_it(tmp_path, content):
    (tmp_path / "config.json").write_text('{"seed": 99887}')
    write_page(tmp_path, full_content(2_000))
    data = (tmp_path / "report.html").read_bytes()
    assert b"99887" in data
    assert len(data) < 600_000


def test_numbers_for_people():
    assert (share(0.0), share(0.0004), share(0.9996), share(1.0)) == ("0%", "0.0%", "100%", "100%")
    assert (short(0.0), short(0.05), short(1234.0), short(2.5e-7), short(3e8)) == (
        "0", "0.05", "1,234", "2e-07".replace("e-0", "e-"), "3e8",
    )  # fmt: skip
    assert (mentioned("popularity"), mentioned("ease"), mentioned("ials")) == (
        "popularity",
        "EASE\u1d3f",
        "iALS",
    )
    assert clean("a" * 90) == "a" * 79 + "\u2026"
    # Letters of scripts that join keep what joins them.
    assert (
        clean("\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")
        == "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    )


def test_a_sweep_has_a_page_too():
    tune = config_of({TEMPERATURE: {"values": [0.1, 0.5]}, BATCH: {"values": [64, 128]}}).tune
    results = four_results()
    parsed = Page(sweep_page(HOSTILE, tune, {"dataset": "d1"}, results, "recall", 7, {"seed": 1}))
    assert parsed.all("h2")[0].text == "Best: temperature=0.5 global_batch_size=64"
    assert [parsed.all("h3", f)[0].text for f in parsed.all("figure")] == [
        TEMPERATURE, BATCH, "Validation Recall@7 of the best trials",
    ]  # fmt: skip
    rows = parsed.tables()["All trials"]
    assert [row[0] for row in rows[1:]] == [r.name for r in sorted(results, key=lambda r: -r.score("recall"))]
    assert rows[-1][-1] == "failed: the loss is nan; lower it"
    assert "--set train.loss.temperature=0.5 train.global_batch_size=64" in parsed.all("pre")[0].text
    # Three of four trials were measured.
    assert len(parsed.all("g", parsed.all("figure")[0], class_="point")) == 3
    assert [s.text for s in parsed.all("script")] == [(FOLDER / "page.js").read_text()]

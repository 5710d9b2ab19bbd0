"""What report.json may hold, with everything in it; and what its page says, read back without our code."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np

RANKERS = {"model": 0.12, "popularity": 0.04, "item_knn_cosine": 0.08, "ease": 0.1, "true_model": 0.2}
KS = (10, 20, 100)
BY_K = (1, 2, 5, 10, 20, 50, 100)
GROUPS = ("Drama", "Comedy", "Action", "Crime", "Horror", "War", "Western", "Musical", "Noir", "other")
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\t\u202egnp\x00'
"""A title that tries everything; a page shows it as text."""


def full_content(items: int = 400, hostile: str = HOSTILE) -> dict[str, Any]:
    """Return a report with every part; ``hostile`` stands wherever somebody else's text may stand."""
    rng = np.random.default_rng(3)
    metrics = {
        name: {
            **{f"recall@{k}": base * (k / 10) ** 0.4 for k in KS},
            **{f"ndcg@{k}": base * 1.5 * (k / 10) ** 0.1 for k in KS},
            **{f"coverage@{k}": 0.3 for k in KS},
            "same_top10": 0.02,
        }
        for name, base in RANKERS.items()
    }
    accurate = [name for name in metrics["model"] if name[:4] in ("reca", "ndcg")]
    titles = [f"Title {i}" for i in range(items)]
    titles[0] = hostile
    history = [
        {
            "epoch": e,
            "loss": 6.0 - e,
            "temperature": 0.1 - 0.01 * e,
            "seconds": 2.0,
            "validation_recall": 0.1 * e,
            "validation_ndcg": 0.05 * e,
        }
        for e in (1, 2, 3)
    ]
    item = {"item_id": "i<1>", "title": hostile, "group": hostile}
    return {
        "inputs": {"name": hostile, "dataset": "d1", "checkpoint": "c1", "generation": hostile, "seed": 1234},
        "counts": {"users": 90, "without_relevant": 7, "not_drawn": 0, "evaluated": 83, "items": items},
        "metrics": metrics,
        "intervals": {r: {n: [metrics[r][n] * 0.9, metrics[r][n] * 1.1] for n in accurate} for r in metrics},
        "differences": {
            r: {
                n: {
                    "difference": metrics["model"][n] - metrics[r][n],
                    "low": metrics["model"][n] - metrics[r][n] - 0.005,
                    "high": metrics["model"][n] - metrics[r][n] + 0.005,
                    "p": 0.0002,
                }
                for n in accurate
            }
            for r in metrics
            if r != "model"
        },
        "left_out": {"ials": hostile},
        "baselines": {"ease": {"l2": 300.0}},
        "slices": [
            {"by": by, "value": value, "users": users, "metrics": {r: dict(m) for r, m in metrics.items()}}
            for by, value, users in (
                ("activity", "1 to 5", 20),
                ("activity", "over 5", 63),
                ("genres", hostile, 40),
            )
        ],
        "collapse": hostile,
        "latency": {
            "requests": 1000,
            "k": 100,
            "mean_ms": 1.5,
            "p50_ms": 1.25,
            "p95_ms": 3.5,
            "p99_ms": 4.75,
            "max_ms": 30.0,
            "qps": 666.0,
            "share_within_10_ms": 0.998,
            "histogram": {"edges_ms": [0.0, 4.0, 8.0, 12.0], "counts": [900, 90, 8], "beyond": 2},
        },
        "history": history,
        "best_epoch": 2,
        "validation_k": 100,
        "recall_by_k": {
            "ks": list(BY_K),
            "rankers": {r: [base * (k / 10) ** 0.4 for k in BY_K] for r, base in RANKERS.items()},
        },
        "exposure": {
            "k": 10,
            "bands": [
                {"name": "0", "label": "0", "items": 100, "consumed": 0.1, "recommended": 0.0},
                {"name": "1-3", "label": "1+", "items": 200, "consumed": 0.4, "recommended": 0.25},
                {"name": "4-9", "label": "4+", "items": 100, "consumed": 0.5, "recommended": 0.75},
            ],
        },
        "map": {
            "group_name": "genres",
            "x": rng.integers(0, 1000, items).tolist(),
            "y": rng.integers(0, 900, items).tolist(),
            "groups": [hostile if i == 1 else GROUPS[i % len(GROUPS)] for i in range(items)],
            "titles": titles,
        },
        "about": {
            "rule": "The last 20% of each user's interactions are test.",
            "tables": {
                "Data": {
                    "source": hostile,
                    "users": 90,
                    "items of the catalogue": items,
                    "interactions": 12345,
                }
            },
            "index": {
                "factory": "IVF64,SQ8",
                "reason": hostile,
                "effort": {"nprobe": 8},
                "index_recall": 0.97,
                "target_index_recall": 0.95,
                "recall_k": 100,
                "search_ms": {"p50": 0.2, "p99": 0.4},
                "curve": [
                    {"effort": {"nprobe": p}, "index_recall": recall, "search_ms": ms}
                    for p, recall, ms in ((2, 0.7, 0.1), (8, 0.97, 0.2), (32, 0.995, 0.5))
                ],
            },
        },
        "examples": [
            {
                "user_id": hostile,
                "key": f"{n:032x}",
                "num_history": 31,
                "num_held_out": 2,
                "history": [{**item, "time": 1_100_000_000_000_000}] * 3,
                "recommended": [{**item, "hit": place == 1} for place in range(4)],
                "held_out": [{"item_id": "only-an-id"}],
            }
            for n in range(2)
        ],
    }


class Page(HTMLParser):
    """A page as a tree that can be asked."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.comments: list[str] = []
        self._open: list[Element] = []
        self.feed(text)
        assert [e.name for e in self._open] == [], "an element is not closed"

    _VOID = ("meta", "br", "img", "link", "input", "hr")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {k: v or "" for k, v in attrs}, list(self._open))
        self.elements.append(element)
        if tag not in self._VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {k: v or "" for k, v in attrs}, list(self._open)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1].name == tag, f"</{tag}> closes {self._open[-1].name}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def all(self, name: str, inside: Element | None = None, **attributes: str) -> list[Element]:
        """Return elements of a name, inside another one, with classes or attributes."""
        return [
            e
            for e in self.elements
            if e.name == name
            and (inside is None or inside in e.above)
            and all(v in e.attributes.get(k.rstrip("_"), "").split(" ") for k, v in attributes.items())
        ]

    def tables(self) -> dict[str, list[list[str]]]:
        """Return the texts of all tables by their captions, the heading first."""
        found = {}
        for table in self.all("table"):
            rows = []
            for row in self.all("tr", table):
                cells = [e for e in self.elements if e.name in ("th", "td") and row in e.above]
                # What is said below a value is not part of it.
                rows.append(
                    [c.text.removesuffix("".join(s.text for s in self.all("small", c))) for c in cells]
                )
            found[self.all("caption", table)[0].text] = rows
        return found


class Element:
    """An element, those around it, and the text inside."""

    def __init__(self, name: str, attributes: dict[str, str], above: list[Element]) -> None:
        self.name, self.attributes, self.above, self.text = name, attributes, above, ""

"""From what a report or a sweep holds to one file of HTML.

Everything goes through a template with automatic escaping; the only markup that is taken as it is are the
drawings of ``svg``, which escapes what it is given. The policy in the page's head lets it load nothing and
run one script, the page's own, by its hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from twotower.artefacts import write_bytes
from twotower.evaluation.page import quality, sections
from twotower.evaluation.page.numbers import clean, count, is_number, metric_name, milliseconds, score
from twotower.evaluation.page.quality import Verdict
from twotower.evaluation.page.scatter import map_chart
from twotower.evaluation.page.sections import Section

NAME = "report.html"
_FOLDER = Path(__file__).parent


def write_page(directory: Path, content: Mapping[str, Any]) -> None:
    """Write report.html into an existing directory, beside the config.json that it shows on request.

    Args:
        directory: to write into.
        content: of report.json; what it lacks is left out.
    """
    config = directory / "config.json"
    stored = json.loads(config.read_bytes()) if config.is_file() else None
    write_bytes(directory / NAME, page(content, stored).encode())


def page(content: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> str:
    """Return the page of a report; see ``write_page``."""
    metrics = quality.metrics_of(content)
    items = content.get("map") or {"x": [], "y": [], "groups": [], "titles": [], "group_name": ""}
    points = list(zip(items["x"], items["y"], strict=True))
    catalogue = quality.present(
        [
            map_chart(points, items["groups"], items["titles"], items["group_name"]),
            sections.exposure_chart(content),
        ]
    )
    parts = [
        sections.quality_section(content, metrics),
        sections.slice_section(content, metrics),
        sections.training_section(content),
        sections.serving_section(content),
        Section("catalogue", "Catalogue", charts=catalogue),
        sections.example_section(content),
        sections.run_section(content, config),
    ]
    name = clean((content.get("inputs") or {}).get("name") or "report", 60)
    return render(
        kind="Evaluation",
        name=name,
        verdict=quality.verdict(content, metrics),
        subject=_subject(content),
        alert=clean(content.get("collapse") or "", 600),
        facts=_facts(content, metrics),
        parts=parts,
    )


def _facts(content: Mapping[str, Any], metrics: quality.Metrics) -> list[tuple[str, str]]:
    model, latency = metrics.get("model", {}), content.get("latency") or {}
    index = (content.get("about") or {}).get("index") or {}
    ks = quality.cut_offs(metrics)
    names = list(dict.fromkeys([*quality.primary(metrics), *([f"recall@{ks[-1]}"] if ks else [])]))
    found = [(metric_name(name), score(model[name])) for name in names if name in model]
    if index:
        found.append((f"Index recall@{index.get('recall_k')}", score(index.get("index_recall"))))
    if latency:
        found.append(("Request, p50", milliseconds(latency.get("p50_ms"))))
        found.append(("Request, p99", milliseconds(latency.get("p99_ms"))))
    return found


def _subject(content: Mapping[str, Any]) -> str:
    data = ((content.get("about") or {}).get("tables") or {}).get("Data") or {}
    counts = [
        f"{count(data[key])} {name}"
        for key, name in (("users", "users"), ("items of the catalogue", "items"), ("interactions",) * 2)
        if is_number(data.get(key))
    ]
    return ", ".join([*([clean(data["source"], 60)] if data.get("source") else []), *counts])


def render(
    kind: str,
    name: str,
    verdict: Verdict,
    subject: str,
    alert: str,
    facts: Sequence[tuple[str, str]],
    parts: Sequence[Section],
) -> str:
    """Return a page of sections; empty ones are left out.

    Args:
        kind: what the page is.
        name: of the configuration.
        subject: what it was run on, in a line.
        verdict: said first.
        alert: a failure that is said before everything else; empty where there is none.
        facts: names and values below the verdict.
        parts: in their order.
    """
    styles, script = _asset("page.css"), _asset("page.js")
    return (
        _environment()
        .get_template("page.html")
        .render(
            kind=kind,
            name=name,
            verdict=verdict,
            subject=subject,
            alert=alert,
            facts=facts,
            parts=[part for part in parts if not part.is_empty],
            styles=Markup(styles),
            script=Markup(script),
            policy="default-src 'none'; base-uri 'none'; form-action 'none'; "
            f"style-src '{_digest(styles)}'; script-src '{_digest(script)}'",
        )
    )


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"

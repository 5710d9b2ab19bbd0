"""Two models side by side: a finished report, with the model of another one among its rankers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from twotower.artefacts import MANIFEST, building, fingerprint, finished, read_manifest, write_manifest
from twotower.errors import ArtefactError, ArtefactMismatchError, ConfigError
from twotower.evaluation.intervals import differences, intervals
from twotower.evaluation.metrics import METRICS
from twotower.evaluation.outcomes import column_name, read_users
from twotower.evaluation.report import KIND, ReportManifest, write_content
from twotower.jsonfiles import read_json

COMPARED = "compared"
"""Name of the other model among the rankers of a report."""

_VERSION = 1
"""Changes whenever the same reports give another one."""
_REPORT = "report.json"
_AGAIN = "Evaluate that model again."


def report_of(reports: Path, name: str) -> Path:
    """Return the directory of a report that is given by its path, or by its ID below ``reports``.

    Raises:
        ArtefactError: there is none.
    """
    for path in (Path(name), reports / name):
        if (path / MANIFEST).is_file():
            read_manifest(path, KIND, ReportManifest)
            return path
    raise ArtefactError(
        f"--compare {name}: there is no finished report at that path, nor of that name in {reports}; give "
        "the folder that jobs.evaluate printed"
    )


def check_comparable(split: str, dataset: str, name: str, other: Path) -> None:
    """Check that another report is of the same test.

    Args:
        split: fingerprint of this report's test users, masked and relevant items.
        dataset: fingerprint of its dataset.
        name: of this report, for the error.
        other: directory of the other one.

    Raises:
        ArtefactMismatchError: its users, masks or relevant items are others; it names both.
        ArtefactError: an older release wrote it.
    """
    manifest = read_manifest(other, KIND, ReportManifest)
    theirs = manifest.get("split")
    if theirs is None:
        raise ArtefactError(f"report {other} does not say what was asked of whom. {_AGAIN}")
    if theirs != split:
        raise ArtefactMismatchError(
            f"{name} is of split {split} of dataset {dataset}, and report {other} of split {theirs} of "
            f"dataset {manifest.get('dataset')}: metrics of other users or items say nothing of the models. "
            "Evaluate both with the same data, split, evaluation.repeats, evaluation.max_users and seed"
        )


def set_side_by_side(report: Path, other: Path) -> Path:
    """Return the report ``report`` with the model of ``other`` beside its own; made once.

    The new report has the ranker ``compared``: its metrics, intervals, the differences of the two models
    user by user, and its metrics in the slices that both have. Metrics that the other one lacks are left out.

    Args:
        report: directory of a finished report.
        other: directory of another one.

    Raises:
        ArtefactMismatchError: they are of different tests.
        ArtefactError: one of them can not be read.
        ConfigError: they have no cut-off in common.
    """
    mine, theirs = (read_manifest(path, KIND, ReportManifest) for path in (report, other))
    check_comparable(str(mine.get("split")), str(mine.get("dataset")), f"report {report}", other)
    name = fingerprint({"report": mine["id"], "compared": theirs["id"], "version": _VERSION})
    directory = report.with_name(name)
    if finished(directory, KIND, ReportManifest):
        return directory
    content = _joined(
        read_json(report / _REPORT, _AGAIN), read_json(other / _REPORT, _AGAIN), report, other, theirs["id"]
    )
    with building(directory) as partial:
        for path in report.iterdir():
            # Pages are made anew from the content.
            if path.is_file() and path.name != MANIFEST and not path.name.startswith("report."):
                shutil.copy2(path, partial / path.name)
        write_content(partial, content)
        facts = {key: value for key, value in mine.items() if key not in ("kind", "schema_version")}
        metrics = content["metrics"][COMPARED]
        flat = {column_name(COMPARED, key): value for key, value in metrics.items() if value is not None}
        facts |= {
            "id": name,
            "compared": theirs["id"],
            "metrics": {**facts["metrics"], **flat},
            "by_ranker": {**facts["by_ranker"], COMPARED: metrics},
        }
        write_manifest(partial, KIND, facts)
    return directory


def _joined(
    mine: dict[str, Any], theirs: dict[str, Any], report: Path, other: Path, other_id: str
) -> dict[str, Any]:
    """The content of ``mine`` with the other model."""
    metrics = {name: theirs["metrics"]["model"].get(name) for name in mine["metrics"]["model"]}
    metrics = {name: value for name, value in metrics.items() if value is not None}
    common = [name for name in metrics if name.partition("@")[0] in METRICS]
    if not common:
        raise ConfigError(
            f"report {report} and report {other} have no cut-off in common; evaluate both with the same "
            "evaluation.ks"
        )
    values = {"model": read_users(report, common), COMPARED: read_users(other, common)}
    seed = int(mine["inputs"]["seed"])
    gained = differences(values["model"], values, [COMPARED], common, seed)
    spans = intervals({COMPARED: values[COMPARED]}, common, seed)
    there = {(piece["by"], piece["value"]): piece for piece in theirs["slices"]}
    slices = []
    for piece in mine["slices"]:
        match = there.get((piece["by"], piece["value"]))
        if match is not None:
            piece = {**piece, "metrics": {**piece["metrics"], COMPARED: match["metrics"]["model"]}}
        slices.append(piece)
    return {
        **mine,
        "inputs": {**mine["inputs"], COMPARED: other_id, f"{COMPARED}_name": theirs["inputs"]["name"]},
        "metrics": {**mine["metrics"], COMPARED: metrics},
        "differences": {**mine["differences"], **gained},
        "intervals": {**mine["intervals"], **spans},
        "slices": slices,
    }

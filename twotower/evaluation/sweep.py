"""A sweep: its trials, and what they came to as a table, a page and a picture.

The trials of a configuration, their order and their names follow from ``tune`` and the seed alone, so that a
sweep that is run again finds its own. A trial is an ordinary configuration with some keys replaced.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from twotower.artefacts import fingerprint, write_bytes, write_json
from twotower.config import Config, parse_config, put_value, text_of
from twotower.config.tune import ParameterConfig, TuneConfig
from twotower.errors import ArtefactError, ConfigError
from twotower.evaluation.sweep_plot import Panel, effect_plot
from twotower.jsonfiles import check_shape, read_json
from twotower.progress import say

Status = Literal["running", "finished", "stopped", "failed"]

_SECTIONS = ("seed", "data", "split", "features", "model", "train")
_SHOWN_ERRORS = 5
_CELL_WIDTH = 90
_AGAIN = "The trial is run again."


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    name: str
    """Position and a hash of the parameters, such as ``003-5e1f0c2a``."""
    parameters: dict[str, Any]
    """What differs from the sweep's configuration, by dotted key."""
    config: Config
    """The whole configuration of the training."""

    @property
    def label(self) -> str:
        """The parameters for people, such as ``temperature=0.05 global_batch_size=256``."""
        return label(self.parameters)


@dataclass
class TrialResult:
    """What is known of a trial."""

    name: str
    parameters: dict[str, Any]
    status: Status = "running"
    """``stopped``: given up early by the scheduler; ``failed``: ended by ``error``."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One mapping an epoch, with ``epoch``, ``validation_recall``, ``validation_ndcg``, ``seconds``."""
    checkpoint: str | None = None
    """Checkpoint of a finished trial."""
    run: str | None = None
    """Folder of Ray Train's own checkpoints of a trial that is not finished."""
    error: str | None = None

    @classmethod
    def read(cls, path: Path) -> TrialResult | None:
        """Return what was written of a trial; None where nothing that can be read was."""
        if not path.is_file():
            return None
        try:
            known: TrialResult = check_shape(read_json(path, _AGAIN), cls, str(path), _AGAIN)
            return known
        except ArtefactError as error:
            say(str(error))
            return None

    def best(self, metric: str) -> dict[str, Any] | None:
        """Return the epoch with the highest ``validation_`` metric; None where there is none."""
        key = f"validation_{metric}"
        epochs = [report for report in self.history if report.get(key) is not None]
        return max(epochs, key=lambda report: report[key], default=None)

    def score(self, metric: str) -> float:
        """Return the highest ``validation_`` metric of all epochs, minus infinity where there is none."""
        best = self.best(metric)
        return -math.inf if best is None else float(best[f"validation_{metric}"])

    def to_json(self) -> dict[str, Any]:
        """Return what ``TrialResult(**value)`` takes."""
        return asdict(self)


def carry_over(directory: Path, partial: Path) -> None:
    """Take what is known of the trials of a finished sweep into one that goes on where some failed.

    One by one, each whole or not at all: a run may be killed in between, and goes on with the others.
    """
    (partial / "trials").mkdir(exist_ok=True)
    for record in sorted((directory / "trials").glob("[!.]*.json")):
        if not (partial / "trials" / record.name).exists():
            write_bytes(partial / "trials" / record.name, record.read_bytes())


def trials_of(config: Config) -> list[Trial]:
    """Return the trials of ``config.tune``, the grid's last parameter changing fastest.

    Draws that coincide give one trial.

    Raises:
        ConfigError: there is nothing to try, a key is unknown or no part of a training, or a combination of
            values is not allowed; each is named.
    """
    tune = config.tune
    _check_parameters(tune, config.train.epochs)
    trials: dict[str, Trial] = {}
    refused: dict[str, str] = {}
    for parameters in _combinations(tune, config.seed):
        key = fingerprint(parameters)
        if key in trials:
            continue
        try:
            changed = with_parameters(config, parameters)
        except ConfigError as error:
            refused.setdefault(str(error), label(parameters))
            continue
        trials[key] = Trial(f"{len(trials) + 1:03d}-{key[:8]}", parameters, changed)
    if refused:
        lines = [f"{name}: {message}" for message, name in list(refused.items())[:_SHOWN_ERRORS]]
        if len(refused) > _SHOWN_ERRORS:
            lines.append(f"and {len(refused) - _SHOWN_ERRORS} more")
        raise ConfigError("tune.parameters holds combinations that are not valid:\n" + "\n".join(lines))
    return list(trials.values())


def with_parameters(config: Config, parameters: Mapping[str, Any]) -> Config:
    """Return the configuration with the values of dotted keys replaced.

    Raises:
        ConfigError: a key is unknown, or the result is not valid.
    """
    values = config.to_json()
    for key, value in parameters.items():
        put_value(values, key, value, key)
    return parse_config(values)


def label(parameters: Mapping[str, Any]) -> str:
    """Return parameters for people, with the shortest names that tell them apart."""
    names = short_names(list(parameters))
    return " ".join(f"{names[key]}={text_of(value)}" for key, value in parameters.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return for each dotted key its shortest ending that no other key has."""
    names = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        names[key] = next(e for e in endings if e == key or not any(o.endswith(f".{e}") for o in others))
    return names


def set_line(parameters: Mapping[str, Any]) -> str:
    """Return the ``--set`` arguments that repeat a trial, quoted for a shell."""
    return " ".join(["--set", *(shlex.quote(f"{key}={text_of(value)}") for key, value in parameters.items())])


def ranked(results: Sequence[TrialResult], metric: str) -> list[TrialResult]:
    """Return trials from the best to the worst, those without a measurement last."""
    return sorted(results, key=lambda result: -result.score(metric))


def table(results: Sequence[TrialResult], metric: str, k: int) -> list[list[str]]:
    """Return the rows of the comparison, the heading first and then the best trial."""
    keys = list(results[0].parameters)
    names = short_names(keys)
    measured = [metric, *({"recall", "ndcg"} - {metric})]
    heading = ["trial", *(names[key] for key in keys), *(f"validation {name}@{k}" for name in measured)]
    rows = [[*heading, "best epoch", "epochs", "seconds", "status"]]
    for result in ranked(results, metric):
        best = result.best(metric) or {}
        row = [result.name, *(text_of(result.parameters[key]) for key in keys)]
        row += [_number(best.get(f"validation_{name}")) for name in measured]
        seconds = sum(report.get("seconds") or 0.0 for report in result.history)
        row += [str(best.get("epoch", "-")), str(len(result.history)), f"{seconds:.1f}"]
        rows.append([*row, f"{result.status}: {result.error}" if result.error else result.status])
    return rows


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns, long cells cut."""
    cells = [[textwrap.shorten(cell, _CELL_WIDTH, placeholder=" ...") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def effects(
    results: Sequence[TrialResult], parameters: Mapping[str, ParameterConfig], metric: str
) -> dict[str, list[dict[str, Any]]]:
    """Return what each listed value of each parameter came to, over the values of the others.

    A parameter drawn from a range has no listed values and is left out. Trials that were stopped early count
    for the best score of a value, and not for the mean.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for key, parameter in parameters.items():
        for value in parameter.listed or []:
            chosen = [r for r in results if r.parameters[key] == value and math.isfinite(r.score(metric))]
            ended = [r.score(metric) for r in chosen if r.status == "finished"]
            row = {
                "value": value,
                "finished": len(ended),
                "mean": float(np.mean(ended)) if ended else None,
                "best": max((r.score(metric) for r in chosen), default=None),
            }
            found.setdefault(key, []).append(row)
    return found


def write_sweep(
    directory: Path, results: Sequence[TrialResult], tune: TuneConfig, metric: str, k: int
) -> None:
    """Write sweep.json, .csv, .txt, .md and .png into an existing directory.

    Args:
        directory: to write into.
        results: of all trials; at least one was measured.
        tune: what was tried.
        metric: ``recall`` or ``ndcg`` of the validation, which ranks trials.
        k: its cut-off.
    """
    rows = table(results, metric, k)
    found = effects(results, tune.parameters, metric)
    write_json(
        directory / "sweep.json",
        {
            "metric": f"validation_{metric}@{k}",
            "trials": [result.to_json() for result in ranked(results, metric)],
            "effects": found,
        },
    )
    buffer = io.StringIO()
    keys = list(results[0].parameters)
    csv.writer(buffer).writerows([[rows[0][0], *keys, *rows[0][1 + len(keys) :]], *rows[1:]])
    write_bytes(directory / "sweep.csv", buffer.getvalue().encode())
    write_bytes(directory / "sweep.txt", "\n".join([*text_table(rows), ""]).encode())
    effect_plot(directory / "sweep.png", panels(results, found, metric), f"{metric}@{k}")
    write_bytes(directory / "sweep.md", _markdown(rows, found, results, metric, k).encode())


def panels(
    results: Sequence[TrialResult], found: Mapping[str, list[dict[str, Any]]], metric: str
) -> list[Panel]:
    """Return what each parameter did, by ``effects``; trials that were not measured are left out."""
    measured = [result for result in results if math.isfinite(result.score(metric))]
    drawn = []
    for key in measured[0].parameters:
        values = [result.parameters[key] for result in measured]
        means = [
            (text_of(row["value"]), row["mean"]) for row in found.get(key, []) if row["mean"] is not None
        ]
        drawn.append(
            Panel(
                title=key,
                names=[result.name for result in measured],
                values=values,
                texts=[text_of(value) for value in values],
                scores=[result.score(metric) for result in measured],
                finished=[result.status == "finished" for result in measured],
                means=means,
            )
        )
    return drawn


def _markdown(
    rows: list[list[str]],
    found: Mapping[str, list[dict[str, Any]]],
    results: Sequence[TrialResult],
    metric: str,
    k: int,
) -> str:
    best = ranked(results, metric)[0]
    lines = [
        f"# Sweep of {', '.join(best.parameters)}",
        "",
        f"{len(results)} trials by the best validation {metric}@{k} of their epochs. A stopped trial was "
        "given up early by ASHA, so its score is that of fewer epochs.",
        "",
        *_markdown_table(rows),
        "",
        f"The best again: `{set_line(best.parameters)}`",
        "",
        "![validation metric by parameter](sweep.png)",
    ]
    for key, values in found.items():
        heading = ["value", f"mean {metric}@{k} (finished trials)", f"best {metric}@{k}", "finished trials"]
        body = [
            [text_of(row["value"]), _number(row["mean"]), _number(row["best"]), str(row["finished"])]
            for row in values
        ]
        lines += ["", f"## {key}", "", *_markdown_table([heading, *body])]
    return "\n".join([*lines, ""])


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(cells[0])}", *lines[1:]]


def _check_parameters(tune: TuneConfig, epochs: int) -> None:
    if not tune.parameters:
        raise ConfigError(
            "tune.parameters is empty; name what to try, such as "
            "--set 'tune.parameters={train.loss.temperature: {values: [0.05, 0.1]}}'"
        )
    for key in tune.parameters:
        section = key.split(".")[0]
        if section in Config.model_fields and section not in _SECTIONS:
            raise ConfigError(
                f"tune.parameters: {key} does not change a training; a sweep varies keys of "
                f"{', '.join(_SECTIONS)}"
            )
        if re.match(r"train\.(validation|fit)(\.|$)|(data|split|features|model|train)$", key):
            raise ConfigError(
                f"tune.parameters: {key} is no single setting of a training (or is what trials are compared "
                "by); fix it with --set, and name a key such as train.loss.temperature"
            )
    if tune.samples > 1 and not any(p.is_drawn for p in tune.parameters.values()):
        raise ConfigError(
            f"tune.samples ({tune.samples}) has no effect where every parameter lists values; use 1, or draw "
            "one by choice, uniform or log_uniform"
        )
    if tune.scheduler == "asha" and "train.epochs" not in tune.parameters and tune.grace_epochs > epochs:
        raise ConfigError(
            f"tune.grace_epochs ({tune.grace_epochs}) is above train.epochs ({epochs}), so ASHA would never "
            f"stop a trial; use at most {epochs}, or tune.scheduler: none"
        )


def _combinations(tune: TuneConfig, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    grid = {key: p.values for key, p in tune.parameters.items() if p.values is not None}
    for values in itertools.product(*grid.values()):
        for _ in range(tune.samples):
            chosen = dict(zip(grid, values, strict=True))
            chosen |= {key: _draw(p, rng) for key, p in tune.parameters.items() if p.is_drawn}
            yield {key: chosen[key] for key in tune.parameters}


def _draw(parameter: ParameterConfig, rng: np.random.Generator) -> Any:
    if parameter.choice is not None:
        return parameter.choice[int(rng.integers(len(parameter.choice)))]
    low, high = parameter.bounds
    if parameter.uniform is not None:
        value = float(rng.uniform(low, high))
    else:
        value = math.exp(float(rng.uniform(math.log(low), math.log(high))))
    step = parameter.multiple_of
    if step is None:
        # Six digits are all that a person wants to type again.
        return min(max(float(f"{value:.6g}"), low), high)
    lowest, highest = math.ceil(low / step), math.floor(high / step)
    return step * min(max(round(value / step), lowest), highest)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"

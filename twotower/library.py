"""The steps as functions of a program or a notebook: ``import twotower as tt``.

Without ``address`` a step runs in this process and loads no Ray; with one, the same step runs on that Ray
cluster. Both write the same artefacts below ``storage.root / name``, which the jobs and the service read, and
each step recognises what is finished already.

This module imports what a step needs when the step is called.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.artefacts import read_manifest
from twotower.config import Config, FilesSource, parse_config
from twotower.config.building import GIVEN
from twotower.data.dataset import Dataset
from twotower.environment import apply_environment, check_storage
from twotower.errors import ConfigError

if TYPE_CHECKING:
    from twotower.pipeline.runner import Begin
    from twotower.pipeline.train import Checkpoints

__all__ = ["Report", "build", "evaluate", "prepare", "train"]

_TABLES = ("interactions", "items", "users")


@dataclass(frozen=True)
class Report:
    """What a model comes to on the test split, beside baselines.

    Example:
        >>> report = tt.evaluate(config, data, checkpoints)
        >>> report.page.name
        'report.html'
        >>> 0 <= report.metrics["recall@10"] <= 1
        True
    """

    path: Path
    """Folder of the report: ``report.html``, pictures, and the metrics of each user."""
    metrics: dict[str, Any] = field(repr=False)
    """The model's metrics, such as ``recall@10`` and ``ndcg@10``, most in [0, 1]; with a generation also
    ``latency_p50_ms``, in milliseconds."""
    by_ranker: dict[str, dict[str, float | None]] = field(repr=False)
    """The same of ``model`` and each baseline, such as ``popularity``."""

    @property
    def page(self) -> Path:
        """The report as a page to be opened in a browser."""
        return self.path / "report.html"


def prepare(config: Config, interactions: Any = None, items: Any = None, users: Any = None) -> Dataset:
    """Return the dataset of raw data: ids as rows, features, and a split into train, validation and test.

    A table that is given takes the place of the file that ``data.source`` would name, and is read by the same
    rules: bad rows, repeats, ids, times and categories. The mapping of its columns is that of the
    configuration. No copy of it is kept.

    Args:
        config: with a ``data.source`` of kind ``files`` where tables are given.
        interactions: one row for each interaction: a pandas DataFrame, an Arrow table, a mapping of column
            names to values, or the path of CSV or Parquet files. Without it, ``data.source`` says where.
        items: one row for each item; its id is in the column ``data.source.items.id``, or else in one called
            as in the interactions.
        users: one row for each user, likewise.

    Returns:
        the dataset, in ``config.datasets``; the same data and settings are prepared once.

    Raises:
        ConfigError: settings contradict each other or the data, or a table is of no known kind.
        DataError: the data is missing, unreadable or breaks a rule.

    Example:
        >>> log = {"user": ["a", "a", "b", "b"] * 3, "item": list("wxyzwxyzwxyz"), "day": range(12)}
        >>> columns = {"user": "user", "item": "item", "time": "day", "time_unit": "s"}
        >>> small = tt.configure({"name": "four", "data.source.columns": columns})
        >>> dataset = tt.prepare(small, interactions=log)
        >>> dataset.num_users, dataset.num_items
        (2, 4)
    """
    from twotower.data.given import arrow_table, as_file
    from twotower.data.prepare import prepare as prepare_files

    given = {"interactions": interactions, "items": items, "users": users}
    given = {name: table for name, table in given.items() if table is not None}
    with contextlib.ExitStack() as stack:
        paths = {}
        for name, table in given.items():
            if not isinstance(table, str | Path):
                table = stack.enter_context(as_file(arrow_table(table, name), config.home / "tables", name))
            paths[name] = str(Path(table).expanduser().absolute())
        return prepare_files(_with_paths(config, paths))


def train(config: Config, data: Dataset, *, address: str | None = None) -> Checkpoints:
    """Train the two towers, and return the checkpoints.

    Training stops early where validation no longer improves, and with ``train.fit: all`` the model is trained
    again for as many epochs: on train and validation to be measured, on everything to be served. One that was
    interrupted goes on from its last epoch when it is called again.

    Args:
        config: of the model and the training. In this process one worker trains, with
            ``train.threads_per_worker`` CPU threads; the number that torch had is set again afterwards.
        data: of ``prepare``.
        address: None trains in this process; a Ray cluster otherwise: ``HOST:PORT`` of its head, ``auto``
            for the one that ``RAY_ADDRESS`` names or that runs on this machine, ``local`` for a new one.

    Returns:
        the folders ``chosen`` (on the train split), ``evaluated`` and ``served``; with ``train.fit: train``
        they are one.

    Raises:
        ConfigError: data and configuration do not fit together.
        TrainingError: training can not start, or diverged.

    Example:
        >>> checkpoints = tt.train(config, data)
        >>> checkpoints.served == tt.train(config, data).served  # found, not trained again
        True
    """
    from twotower.pipeline.train import train_all
    from twotower.training.preflight import require

    require(config, data, {"train"})
    if address is None:
        return train_all(config, data)
    _ray_before(config, address)
    from twotower.cluster.train import on_ray

    return train_all(config, data, on_ray(address=address))


def build(
    config: Config,
    data: Dataset,
    checkpoints: Checkpoints | Path | str,
    *,
    publish: bool = True,
    force: bool = False,
    address: str | None = None,
) -> Path:
    """Encode the catalogue, build the index, measure its recall, and publish the generation.

    Args:
        config: of the index.
        data: what the model was trained on.
        checkpoints: of ``train``, of which ``served`` is taken; or the folder of one checkpoint.
        publish: let ``CURRENT`` of ``config.store`` name it, which a running service follows.
        force: publish it whatever speaks against it.
        address: as in ``train``.

    Returns:
        the folder of the generation, which ``Retriever.open`` takes. Its manifest has the measured recall of
        the index, in [0, 1], and the milliseconds of a search.

    Raises:
        ConfigError: the index can not hold this catalogue.
        ArtefactMismatchError: the checkpoint is of other data.
        RefusedError: the recall is below ``index.target_index_recall``, or another gate was not passed; the
            generation is built, and ``CURRENT`` names what it named before.

    Example:
        >>> generation = tt.build(config, data, checkpoints)
        >>> (generation / "manifest.json").is_file()
        True
    """
    from twotower.pipeline import publishing
    from twotower.pipeline.build import build_generation
    from twotower.training.preflight import require

    require(config, data, {"index"})
    generation = build_generation(config, data, _folder(checkpoints, "served"), _begin(config, address))
    if publish:
        reasons = publishing.reasons_against(config, data, generation)
        publishing.publish(config, generation.name, force=force, reasons=reasons)
    return generation


def evaluate(
    config: Config,
    data: Dataset,
    checkpoints: Checkpoints | Path | str,
    generation: Path | str | None = None,
    *,
    address: str | None = None,
) -> Report:
    """Measure a model on the test split beside baselines, and draw the report.

    Args:
        config: of the evaluation.
        data: what the model was trained on.
        checkpoints: of ``train``, of which ``evaluated`` is taken; or the folder of one checkpoint.
        generation: of ``build``, whose milliseconds for each request are measured too.
        address: as in ``train``.

    Returns:
        the metrics and where the report is. The same inputs are evaluated once.

    Raises:
        ConfigError: the checkpoint has been fitted on the test split.
        ArtefactMismatchError: checkpoint or generation are of other data.
        DataError: no user has a relevant test item.

    Example:
        >>> report = tt.evaluate(config, data, checkpoints)
        >>> set(report.by_ranker) > {"model", "popularity"}
        True
    """
    from twotower.pipeline.evaluate import evaluate as measure
    from twotower.training.preflight import require

    require(config, data, {"evaluate"})
    checkpoint = _folder(checkpoints, "evaluated")
    other = None if generation is None else Path(generation)
    path = measure(config, data, checkpoint, other, _begin(config, address))
    manifest = read_manifest(path, "report")
    return Report(path, manifest["metrics"], manifest["by_ranker"])


def _begin(config: Config, address: str | None) -> Begin:
    from twotower.pipeline.runner import one_process

    if address is None:
        return one_process
    _ray_before(config, address)
    from twotower.cluster.runner import on_ray

    return on_ray(address)


def _ray_before(config: Config, address: str) -> None:
    """Do what has to be done before Ray is imported, which reads its environment then."""
    # Where nothing is said about the cluster, the environment says it.
    check_storage(config, None if address == "auto" else {"RAY_ADDRESS": address})
    apply_environment()


def _folder(checkpoints: Any, name: str) -> Path:
    return Path(checkpoints) if isinstance(checkpoints, str | Path) else Path(getattr(checkpoints, name))


def _with_paths(config: Config, paths: dict[str, str]) -> Config:
    """Return the configuration whose files are these.

    Raises:
        ConfigError: it has no files, or one of them is not given.
    """
    source = config.data.source
    if not isinstance(source, FilesSource):
        if not paths:
            return config
        raise ConfigError(
            f"{', '.join(paths)} given to prepare, and data.source is of kind {source.kind}; map the columns "
            "by data.source.columns, with kind: files"
        )
    values = config.to_json()
    files = values["data"]["source"]
    if "interactions" in paths:
        files["interactions"] = paths["interactions"]
    for name, column in (("items", source.columns.item), ("users", source.columns.user)):
        if name in paths:
            files[name] = (files[name] or {"id": column}) | {"path": paths[name]}
    for name in _TABLES:
        path = files[name] if name == "interactions" else (files[name] or {}).get("path")
        if path == GIVEN:
            raise ConfigError(
                f"data.source.{name} names no files and none are given; call prepare with {name}=, a "
                "DataFrame, an Arrow table or a path"
            )
    return parse_config(values)

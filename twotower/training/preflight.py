"""What the configuration asks of a prepared dataset, decided before anything that costs.

Whatever training, the index, recommendations and the evaluation would refuse and data and configuration
alone decide is looked at here, all of it, so that a person corrects it once. The steps check it again
themselves: each may run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from twotower.artefacts import read_manifest
from twotower.config import Config
from twotower.config.service import LIST_COLUMNS
from twotower.data.attributes import attribute_columns, attribute_table
from twotower.data.blocks import BlockIndex, read_blocks
from twotower.data.dataset import Dataset
from twotower.data.knowledge import Part, Rules, holdout, nothing_relevant
from twotower.errors import ConfigError, DataError, NotAllowedError, TwotowerError
from twotower.schema import SPLITS
from twotower.training.checks import check_sizes, check_times

Step = Literal["train", "index", "recommend", "evaluate"]
_BLOCK_ROWS = 1 << 20
_REMARK = "the configuration does not fit dataset {path}, and nothing was started:\n  {lines}"


def require(config: Config, dataset: Dataset, steps: Collection[Step]) -> None:
    """Check that steps can be taken with a dataset.

    Raises:
        ConfigError: with everything that speaks against it, a line each.
    """
    lines = [str(problem) for step in steps for problem in problems(config, dataset, step)]
    if lines:
        raise ConfigError(_REMARK.format(path=dataset.path, lines="\n  ".join(lines)))


def problems(config: Config, dataset: Dataset, step: Step) -> Iterator[TwotowerError]:
    """Yield what a step would refuse of a configuration and a dataset."""
    checks: dict[Step, tuple[Callable[[Config, Dataset], object], ...]] = {
        "train": (_sizes, _times, _validation_users, _start),
        "index": (_attributes, _index),
        "recommend": (_fields, _filter),
        "evaluate": (_test_users, _slices),
    }
    for check in checks[step]:
        try:
            check(config, dataset)
        except TwotowerError as error:
            yield error


def _sizes(config: Config, dataset: Dataset) -> None:
    # Interactions that are streamed may not fit into memory.
    path = dataset.path / "interactions.parquet"
    scanned = BlockIndex.scan(path, _BLOCK_ROWS, dataset.num_catalogue_items, SPLITS["train"])
    check_sizes(config, dataset, scanned.num_examples)


def _times(config: Config, dataset: Dataset) -> None:
    check_times(dataset)


def _start(config: Config, dataset: Dataset) -> None:
    start = config.train.init_from
    if start is None:
        return
    manifest = read_manifest(Path(start), "checkpoint")
    if manifest["vocabulary_hash"] != dataset.vocabulary_hash:
        raise ConfigError(
            f"train.init_from: checkpoint {start} is of vocabulary {manifest['vocabulary_hash']}, and the "
            f"dataset has {dataset.vocabulary_hash}; name one that was trained on this dataset"
        )


def _attributes(config: Config, dataset: Dataset) -> pa.Table:
    declared = config.index.attributes
    attribute_table(dataset.item_schema.empty_table(), declared)  # which names all columns there are
    return attribute_table(dataset.item_table(sorted({*attribute_columns(declared).values()})), declared)


def _index(config: Config, dataset: Dataset) -> None:
    from twotower.index.build import check_buildable
    from twotower.index.choice import choose, num_shards

    num_items, dim = dataset.num_catalogue_items, config.model.embedding_dim
    factory = choose(config.index, num_items, dim).factory
    check_buildable(factory, dim, num_items, num_shards(config.index, num_items))


def _fields(config: Config, dataset: Dataset) -> None:
    held = {"title", *dataset.schema.item_columns, *attribute_columns(config.index.attributes).values()}
    known = [name for name in dataset.item_schema.names if name in held and name not in LIST_COLUMNS]
    check_fields(config.recommend.fields, known)


def check_fields(fields: list[str], known: list[str]) -> None:
    """Check ``recommend.fields``.

    Args:
        fields: columns of items that are wanted beside each item.
        known: those that there are.

    Raises:
        ConfigError: a column is not there, or is named twice.
    """
    for name in fields:
        if name not in known or fields.count(name) > 1:
            raise ConfigError(
                f"recommend.fields: {name!r} is no column of items that can be added, or is there twice; "
                f"allowed: {', '.join(known) or 'none: items have ids only'}"
            )


def _filter(config: Config, dataset: Dataset) -> None:
    if not config.recommend.filter:
        return
    from twotower.index.attributes import Attributes

    try:
        table, rows = _attributes(config, dataset), np.arange(dataset.num_catalogue_items)
    except TwotowerError:
        return  # which the index is told
    tables = [(table, rows, rows[:0])] if table.column_names else []
    try:
        found = Attributes(tables, len(rows)).allowed(config.recommend.filter)
    except NotAllowedError as error:
        raise ConfigError(f"recommend.{error}") from None
    if not found.count:
        raise ConfigError(f"recommend.filter leaves none of the {len(rows):,} items; allow at least one")


def _validation_users(config: Config, dataset: Dataset) -> None:
    _users(config, dataset, "validation")


def _test_users(config: Config, dataset: Dataset) -> None:
    _users(config, dataset, "test")


def _slices(config: Config, dataset: Dataset) -> None:
    from twotower.evaluation.slices import check_slices

    check_slices(config.evaluation.slices, dataset, config.index.attributes)


def _users(config: Config, dataset: Dataset, part: Part) -> None:
    rules = Rules.of(dataset, config.evaluation.repeats)
    path = dataset.path / "interactions.parquet"
    blocks = BlockIndex.scan(path, _BLOCK_ROWS, dataset.num_catalogue_items, SPLITS["test"]).blocks
    # The first block has one nearly always.
    if not any(len(holdout(block, part, rules)) for block in read_blocks(path, blocks)):
        raise DataError(f"dataset {dataset.path}: {nothing_relevant(part, rules)}")

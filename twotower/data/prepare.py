"""Raw data to a dataset directory: one process, reading in chunks."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower import progress
from twotower.artefacts import (
    SCHEMA_VERSION,
    building,
    fingerprint,
    has_manifest,
    locked,
    write_json,
    write_manifest,
)
from twotower.cells import joined
from twotower.config import Config
from twotower.config.splits import SPLIT_KINDS
from twotower.data import filters
from twotower.data.attributes import attribute_columns
from twotower.data.chunks import BadRows, RawSource, SideTable
from twotower.data.content import PREPARE_VERSION, content_hash, counted, write_items, write_outside
from twotower.data.dataset import KIND, Dataset
from twotower.data.fitting import fit_features
from twotower.data.impressions import attach
from twotower.data.interactions import Interactions, count_rows
from twotower.data.interning import Interner
from twotower.data.reading import RawInteractions, read_interactions
from twotower.data.sources import open_source
from twotower.data.splits import assign_splits, count_ties
from twotower.data.summary import summary
from twotower.data.vocabulary import Vocabulary, vocabulary_hash
from twotower.errors import ArtefactError, ConfigError, DataError, DownloadError
from twotower.redaction import redacted_values
from twotower.schema import FeatureSchema
from twotower.values import as_text


def prepare(config: Config) -> Dataset:
    """Return the dataset of a configuration, preparing it unless that is done already.

    The directory's name comes from the data, split and features sections and the signature of the raw data,
    so a change in any of them is a new dataset. A killed run leaves nothing that a reader would see.

    Raises:
        ConfigError: settings contradict each other or the source.
        DataError: the raw data is missing, unreadable or breaks a rule.
    """
    try:
        source = open_source(config)
    except DownloadError as error:
        # A mirror that is named and does not work is an error; later jobs need not name it again.
        dataset = None if config.mirror else _prepared_before(config)
        if dataset is None:
            raise
        progress.say(str(error))
        progress.say(f"going on with dataset {dataset.path.name}, which these settings gave before")
        return dataset
    directory = config.datasets / _name(config, source)
    with locked(directory.with_name(f".{directory.name}.prepare.lock")):
        if has_manifest(directory):
            try:
                dataset = Dataset.open(directory)
                progress.say(f"dataset {directory.name} is there already: {summary(dataset)[0]}")
                return dataset
            except ArtefactError as error:
                progress.say(f"{error}; preparing it again")
        started = time.monotonic()
        if source.notice:
            progress.say(source.notice)
        with building(directory) as partial:
            _build(config, source, partial)
        dataset = Dataset.open(directory)
    for line in summary(dataset):
        progress.say(line)
    progress.say(
        f"dataset {directory} (fingerprint {dataset.fingerprint}, {time.monotonic() - started:.1f} s)"
    )
    return dataset


def _name(config: Config, source: RawSource) -> str:
    sections = _sections(config)
    # Few splits depend on the seed; with the others another seed trains on the same dataset.
    seed = config.seed if SPLIT_KINDS[config.split.kind].uses_seed else None
    key = [PREPARE_VERSION, SCHEMA_VERSION, sections, source.signature(), seed]
    return f"{config.data.source.kind}-{fingerprint(key)[:12]}"


def _prepared_before(config: Config) -> Dataset | None:
    """Return the latest finished dataset of the same sections and seed, whatever raw data it came from."""
    wanted = _sections(config) | {"seed": config.seed}
    found = []
    for path in config.datasets.glob(f"{config.data.source.kind}-*/manifest.json"):
        with contextlib.suppress(ArtefactError):
            dataset = Dataset.open(path.parent)
            if dataset.manifest.get("config") == redacted_values(wanted):
                found.append((path.stat().st_mtime_ns, dataset))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _sections(config: Config) -> dict[str, Any]:
    # Where the raw data is fetched from and kept says nothing about what it is.
    return {
        "data": config.data.model_dump(mode="json", exclude={"mirror", "cache"}),
        "split": config.split.model_dump(mode="json"),
        "features": config.features.model_dump(mode="json"),
    }


def _build(config: Config, source: RawSource, directory: Path) -> None:
    bad = BadRows(config.data.on_bad_rows)
    item_side, user_side = source.item_table(bad), source.user_table(bad)
    items = Interner()
    if item_side is not None:
        refuse_duplicates(item_side, "item_id")
        items.add(item_side.data.column("item_id").to_pylist())
    if user_side is not None:
        refuse_duplicates(user_side, "user_id")
    refuse_replaced(config, item_side, user_side)
    of_tables = bad.count
    raw = read_interactions(source, config.data, items, bad)
    bad.settle()
    columns = raw.columns
    if not len(columns["user_row"]):
        raise DataError(
            f"no interactions are left of {raw.rows_read:,} rows read ({bad.count:,} bad, "
            f"{raw.outside_window:,} "
            "outside data.window); check the source and the window"
        )
    counts: dict[str, Any] = {
        "rows_read": raw.rows_read,
        "bad_rows": bad.count,
        "bad_table_rows": of_tables,
        "bad_rows_by_reason": dict(bad.reasons),
        "outside_window": raw.outside_window,
    }
    filters.sort(columns)
    smallest = config.data.min_interactions
    distinct = config.data.repeats != "keep"
    counts["below_min_interactions"] = filters.drop_small(
        columns, len(raw.users), len(raw.items), smallest.user, smallest.item, distinct
    )
    if not len(columns["user_row"]):
        raise DataError(
            f"data.min_interactions (user {smallest.user}, item {smallest.item}) leaves no "
            "interactions; lower it"
        )
    if source.has_times:
        counts["ties"] = count_ties(columns)
    columns["split"] = assign_splits(columns, config.split, source.has_times, config.seed)
    # After the split: what a held-out part repeats was there before it all the same.
    counts["repeats"] = filters.reduce_repeats(columns, config.data.repeats)
    if raw.impressions is not None:
        # With a least number of interactions, none is left of an item that is only shown.
        stays = count_rows(columns["item_row"], len(raw.items)) >= min(smallest.item, 1)
        counts["impressions"] = attach(columns, raw.impressions, stays)
        counts["impressions_left_out"] = len(raw.impressions) - counts["impressions"]
    user_ids, item_ids, item_table, num_catalogue = _vocabularies(config, raw, item_side, user_side)
    interactions = Interactions.of(len(user_ids), **columns)
    schema, item_table, user_columns = fit_features(
        config.features,
        item_table,
        None if user_side is None else user_side.data,
        num_users=len(user_ids),
        num_items=len(item_ids),
        num_catalogue_items=num_catalogue,
        has_times=source.has_times,
    )
    user_table = _align_users(user_ids, user_columns)
    counts |= counted(interactions, schema)
    _write(
        config, source, directory, schema, interactions, user_ids, item_ids, item_table, user_table, counts
    )


def refuse_replaced(config: Config, item_side: SideTable | None, user_side: SideTable | None) -> None:
    """Refuse a feature or attribute of a file's own column whose name stands for another column.

    Raises:
        ConfigError: with the feature and the column.
    """
    used: dict[str, dict[str, str]] = {"item": {}, "user": {}}
    for side, specs in (("item", config.features.item), ("user", config.features.query)):
        for spec in specs:
            column = spec.source_column
            if column is not None:
                used[side].setdefault(
                    column, f"features.{'item' if side == 'item' else 'query'} {spec.name!r}"
                )
    for name, column in attribute_columns(config.index.attributes).items():
        used["item"].setdefault(column, f"index.attributes.{name}")
    for noun, table in (("item", item_side), ("user", user_side)):
        for column, source in (table.replaced if table is not None else {}).items():
            if table is not None and column in used[noun]:
                what = f"column {source!r} of the file" if source else f"the number of an {noun}"
                raise ConfigError(
                    f"{used[noun][column]} asks for column {column!r} of {table.file}, but that name stands "
                    f"for {what}; rename the column in the file"
                )


def refuse_duplicates(side: SideTable, column: str) -> None:
    """Refuse a table that has an id twice.

    Raises:
        DataError: with some of these ids.
    """
    found = side.data.column(column).combine_chunks().value_counts()
    repeated = found.filter(pa.array(found.field("counts").to_numpy() > 1)).field("values")
    if len(repeated):
        noun = column.removesuffix("_id")
        raise DataError(
            f"{side.file} has {len(repeated):,} {noun} ids more than once: "
            f"{', '.join(map(repr, repeated.to_pylist()[:5]))}; leave one row for each {noun}"
        )


def _vocabularies(
    config: Config, raw: RawInteractions, item_side: SideTable | None, user_side: SideTable | None
) -> tuple[Vocabulary, Vocabulary, pa.Table, int]:
    """Drop ids that no interaction is left of, renumber the rows in place, and return the vocabularies.

    Returns:
        User ids, item ids, the catalogue's table in row order, and its number of rows.
    """
    columns = raw.columns
    smallest = config.data.min_interactions
    users_used = count_rows(columns["user_row"], len(raw.users)) > 0
    users = raw.users.ids().filter(pa.array(users_used))
    columns["user_row"] = filters.compact(columns["user_row"], users_used)
    if user_side is not None and smallest.user == 0:
        known = user_side.data.column("user_id").combine_chunks()
        users = pa.concat_arrays([users, known.filter(pc.invert(pc.is_in(known, value_set=users)))])
    items_used = count_rows(columns["item_row"], len(raw.items)) > 0
    num_listed = 0 if item_side is None else item_side.data.num_rows
    if smallest.item == 0:
        items_used[:num_listed] = True  # without a minimum the catalogue is the whole item table
    items = raw.items.ids().filter(pa.array(items_used))
    columns["item_row"] = filters.compact(columns["item_row"], items_used)
    if item_side is None:
        table = pa.table({"item_id": items})
    else:
        table = item_side.data.filter(pa.array(items_used[:num_listed]))
        if not table.num_rows:
            raise DataError(
                f"{item_side.file} has no items (left after data.min_interactions); there is nothing "
                "to recommend"
            )
    return Vocabulary(users), Vocabulary(items), with_title(table), table.num_rows


def with_title(table: pa.Table) -> pa.Table:
    """Return a table of items as item_id, title (text, null where there is none), and its other columns."""
    title = pa.nulls(table.num_rows, pa.string())
    if "title" in table.column_names:
        # One that data.source.items.title names was checked; this happens to be called so.
        try:
            title = as_text(joined(table.column("title"), "column 'title'"))
        except DataError as error:
            progress.say(f"column 'title' of the item table is no title: {error}")
        table = table.drop_columns(["title"])
    table = table.append_column("title", title)
    first = ["item_id", "title"]
    return table.select(first + [n for n in table.column_names if n not in first])


def _align_users(user_ids: Vocabulary, table: pa.Table | None) -> pa.Table:
    """Return a table with one row for each user in row order, null where the user table has no row."""
    ids = pa.table({"user_id": user_ids.array})
    if table is None:
        return ids
    at = pc.index_in(user_ids.array, value_set=table.column("user_id").combine_chunks())
    others = table.drop_columns(["user_id"]).take(at)
    for name in others.column_names:
        ids = ids.append_column(name, others.column(name))
    return ids


def _write(
    config: Config,
    source: RawSource,
    directory: Path,
    schema: FeatureSchema,
    interactions: Interactions,
    user_ids: Vocabulary,
    item_ids: Vocabulary,
    items: pa.Table,
    users: pa.Table,
    counts: dict[str, Any],
) -> None:
    num_catalogue = schema.num_catalogue_items
    progress.say(f"writing {len(interactions):,} interactions and {num_catalogue:,} items")
    interactions.write(directory / "interactions.parquet")
    user_ids.write(directory / "user_ids.arrow")
    item_ids.write(directory / "item_ids.arrow")
    pq.write_table(users, directory / "users.parquet", row_group_size=1 << 16)
    write_outside(directory, item_ids, num_catalogue)
    write_items(directory / "items", items)
    write_json(directory / "features.json", schema.to_json())
    hashed = vocabulary_hash(user_ids, item_ids)
    files = sorted(p for p in directory.rglob("*") if p.is_file() and not p.name.startswith("."))
    manifest = {
        "id": _name(config, source),
        "fingerprint": content_hash(interactions, hashed, items, users, schema, source.has_times),
        "vocabulary_hash": hashed,
        "has_times": source.has_times,
        "as_of": int(interactions.time.max()) if source.has_times else None,
        "counts": counts,
        "source": redacted_values(config.data.source.model_dump(mode="json")),
        "raw": source.facts(),
        "config": redacted_values(_sections(config)) | {"seed": config.seed},
        "files": {str(p.relative_to(directory)): p.stat().st_size for p in files},
    }
    write_manifest(directory, KIND, manifest)

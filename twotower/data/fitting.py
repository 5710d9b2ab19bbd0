"""Feature declarations to fitted features: vocabularies, means, and the column types a dataset stores.

What is learned of a column, and how it is stored, is said by the type of the feature (``twotower.features``).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from twotower.config import FeaturesConfig
from twotower.errors import DataError
from twotower.features.base import ColumnFeature, Feature, Side
from twotower.schema import MAX_PROFILE_WIDTH, FeatureSchema, FittedFeature, profiles_among
from twotower.values import plain


def fit_features(
    config: FeaturesConfig,
    items: pa.Table,
    users: pa.Table | None,
    num_users: int,
    num_items: int,
    num_catalogue_items: int,
    has_times: bool,
) -> tuple[FeatureSchema, pa.Table, pa.Table | None]:
    """Fit all features on the catalogue and the user table.

    Returns:
        The schema, and both tables with their feature columns in stored form: numeric columns as int64 or
        float64, vectors as fixed-size lists of float32, categorical columns that are not numeric as text.

    Raises:
        DataError: a column is not there, has the wrong type, or a value that its feature can not take.
    """
    raw_items, raw_users = items, users
    items = stored_columns("item", config.item, items)
    if users is not None:
        users = stored_columns("query", config.query, users)
    query = [_fit("query", spec.fitted(has_times), users, raw_users) for spec in config.query]
    item = [_fit("item", spec, items, raw_items) for spec in config.item]
    check_profiles(query, item)
    schema = FeatureSchema(
        query=query,
        item=item,
        num_users=num_users,
        num_items=num_items,
        num_catalogue_items=num_catalogue_items,
    )
    return schema, items, users


def check_profiles(query: Sequence[FittedFeature], item: Sequence[FittedFeature]) -> None:
    """Check the width of profiles.

    Raises:
        DataError: the profile of a vocabulary wider than ``MAX_PROFILE_WIDTH``.
    """
    widths = {f.spec.name: f.profile_width for f in item if f.spec.profiled}
    for spec in profiles_among([f.spec for f in query]):
        if widths[spec.of] > MAX_PROFILE_WIDTH:
            raise DataError(
                f"profile feature {spec.name!r} is {widths[spec.of]} wide; at most {MAX_PROFILE_WIDTH} is "
                f"allowed. Lower max_values of {spec.of!r} or take it out"
            )


def stored_columns(side: Side, specs: Sequence[Feature], table: pa.Table) -> pa.Table:
    """Return a table with its feature columns in stored form, as ``fit_features`` says.

    Args:
        side: item or query.
        specs: features of that side.
        table: of items or users.

    Raises:
        DataError: a column is not there, has the wrong type, or a value that its feature can not take.
    """
    by_column: dict[str, list[ColumnFeature]] = {}
    for spec in specs:
        if isinstance(spec, ColumnFeature):
            by_column.setdefault(spec.source_column, []).append(spec)
    for name, used_by in by_column.items():
        if name not in table.column_names:
            raise _absent(side, used_by[0], table)
        first = max(used_by, key=lambda spec: spec.store_rank)
        deciding = [spec for spec in used_by if type(spec) is type(first)]
        column = deciding[0].store(side, name, plain(table.column(name)), deciding)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _absent(side: Side, spec: Feature, table: pa.Table | None) -> DataError:
    what = f"features.{side} {spec.name!r} needs column {spec.source_column!r}"
    where = "item" if side == "item" else "user"
    if table is None:
        return DataError(
            f"{what} of the user table, and the source has no user table; give one or remove the feature"
        )
    there = ", ".join(table.column_names)
    return DataError(f"{what}, and the {where} table does not have it; its columns are {there}")


def _fit(side: Side, spec: Feature, table: pa.Table | None, raw: pa.Table | None) -> FittedFeature:
    if spec.source_column is None:
        return FittedFeature(spec=spec)
    if table is None or raw is None:
        raise _absent(side, spec, None)
    column = plain(table.column(spec.source_column))
    return FittedFeature(spec=spec, **spec.fit(side, column, raw.column(spec.source_column).type))

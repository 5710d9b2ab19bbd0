"""The top k of every user, or of every query of some files, offline, on Ray: workers write Parquet parts.

Users are read from the generation and queries from their files by the workers, which write the lists too, so
nothing large passes through the driver. A part is written whole or not at all and has a name that follows
from its users or queries: a run that was killed goes on with the parts that are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower.artefacts import building, fingerprint, finished, remove, write_json, write_manifest
from twotower.cluster.native_log import without_native_log
from twotower.cluster.pool import work_through
from twotower.cluster.recommend_parts import (
    MAX_SHOWN,
    CheckQueries,
    Recommend,
    check_part,
    num_asked,
    part_name,
)
from twotower.cluster.session import session
from twotower.config import Config
from twotower.config.service import LIST_COLUMNS
from twotower.data.item_files import read_item_ids
from twotower.data.query_files import QueryFile, find_query_files, scan
from twotower.errors import ConfigError, DataError, NotAllowedError
from twotower.generations.generation import Generation
from twotower.generations.manifest import generation_manifest
from twotower.index.allowed import Allowed
from twotower.lifecycle.forget_lists import KIND as KIND
from twotower.lifecycle.forget_lists import RecommendationsManifest
from twotower.pipeline.runner import FEWEST, part_size, ranges
from twotower.progress import bar, say
from twotower.retrieval.front import allowed_items
from twotower.retrieval.query_rows import check_columns
from twotower.training.preflight import check_fields

_VERSION = 2
"""Changes whenever the same inputs give other parts."""

PARTS = "parts"
"""Folder of the Parquet files, which hold nothing else: any reader takes the folder as one table."""


def recommend(
    config: Config,
    generation_dir: Path,
    queries: str | None = None,
    allow_items: str | None = None,
    exclude_items: str | None = None,
) -> Path:
    """Write the top k of every user of a generation or of files of queries, and return the directory.

    Args:
        config: the configuration; its section ``recommend``.
        generation_dir: a finished generation.
        queries: Parquet, CSV or JSON lines: a file, a folder or a glob, which all nodes reach. Each row has
            keys of POST /v1/retrieve but ``fields``, and may have a ``query_id``.
        allow_items: CSV or Parquet files of the ids of items that alone may be recommended.
        exclude_items: the same of items that may not.

    Returns:
        ``config.recommendations / ID`` with ``parts/part-*.parquet`` (columns of ``SCHEMA`` or
        ``QUERIES_SCHEMA``, in the order of users or queries, best item first). The same inputs are
        recommended once.

    Raises:
        ArtefactError: the generation is damaged, or the parts do not hold every user or query once.
        ConfigError: a setting does not fit the generation.
        DataError: a file can not be read, or a query can not be answered; nothing is written then.
    """
    generation_dir = Path(generation_dir).absolute()
    manifest = generation_manifest(generation_dir)
    section = config.recommend.model_dump(mode="json")
    files = None if queries is None else _scanned(queries, config)
    allowed = None if allow_items is None else read_item_ids(config.data, allow_items, "--allow-items")
    excluded = None if exclude_items is None else read_item_ids(config.data, exclude_items, "--exclude-items")
    inputs = {
        "generation": manifest["id"],
        "recommend": section,
        "queries": None if files is None else [[file.kind, file.sha256] for file in files],
        "allow_items": None if allowed is None else fingerprint(sorted(set(allowed))),
        "exclude_items": None if excluded is None else fingerprint(sorted(set(excluded))),
        "version": _VERSION,
    }
    directory = config.recommendations / f"{manifest['id']}-{fingerprint(inputs)[:8]}"
    if finished(directory, KIND, RecommendationsManifest):
        say(f"recommendations {directory.name} are there already")
        return directory
    generation = Generation.open(generation_dir, verify=True)
    settings = {
        "generation": str(generation_dir),
        "k": config.recommend.k,
        "exclude_seen": config.recommend.exclude_seen,
    }
    more = {
        "fields": _checked_fields(generation, config.recommend.fields),
        "among": _among(generation, config.recommend.filter, allowed, excluded),
    }
    if files is None:
        unit, work = "users", ranges(len(generation.user_ids), config)
    else:
        unit, work = "queries", _ranges(files, config)
    parts = {part_name(part["start"], part["stop"]): part for part in work}
    total = sum(num_asked(part) for part in work)
    left = directory.with_name(f".{directory.name}.partial") / PARTS
    with without_native_log(), session(config):
        # A part that is there was written after all queries had been found good.
        if files is not None and not any((left / name).is_file() for name in parts):
            _check_queries(settings, work, total, config)
        with building(directory, keep_partial=True) as partial:
            folder = partial / PARTS
            folder.mkdir(exist_ok=True)
            # Files of another way to share out the work, and of writes that did not end.
            for stray in [path for path in folder.iterdir() if path.name not in parts]:
                remove(stray)
            missing = [part for name, part in parts.items() if not (folder / name).is_file()]
            with bar(total, "recommend", unit=unit) as progress:
                progress.update(total - sum(num_asked(part) for part in missing))
                out = {"out": str(folder.absolute())}
                for fact in work_through(Recommend, settings | more | out, missing, config, gpu=False):
                    progress.update(fact["asked"])
            found = Counter[str]()
            for name, part in parts.items():
                found.update(check_part(folder / name, num_asked(part), config.recommend.k))
            write_json(partial / "config.json", config.to_stored())
            counts = {f"num_{unit}": total, **found, "num_parts": len(parts)}
            write_manifest(partial, KIND, {"id": directory.name, **inputs, **counts})
    num_rows, num_empty = found["num_rows"], found["num_empty"]
    say(f"{num_rows:,} recommendations for {total:,} {unit}, of which {num_empty:,} got none")
    if new := found["num_by_features"] + found["num_ignored"]:
        say(
            f"{new:,} items of their histories are newer than the model: {found['num_by_features']:,} were "
            f"read by their features, and of {found['num_ignored']:,} nothing is known"
        )
    return directory


def _scanned(path: str, config: Config) -> list[QueryFile]:
    stride = min(FEWEST, config.cluster.encode_batch_size)
    files = [scan(file, stride) for file in find_query_files(path, "--queries")]
    for file in files:
        check_columns(file)
    if not any(file.num_queries for file in files):
        raise DataError(f"--queries: {path} holds no query")
    return files


def _ranges(files: Sequence[QueryFile], config: Config) -> list[dict[str, Any]]:
    size = part_size(sum(file.num_queries for file in files), config)
    work: list[dict[str, Any]] = []
    first = 0
    for file in files:
        work += file.ranges(first, size // file.stride * file.stride)
        first += file.num_queries
    return work


def _check_queries(settings: dict[str, Any], work: list[dict[str, Any]], total: int, config: Config) -> None:
    """Check every query before the first is answered, which takes a small share of the time."""
    with bar(total, "check", unit="queries") as progress:
        facts = []
        for fact in work_through(CheckQueries, settings, work, config, gpu=False):
            progress.update(fact["asked"])
            facts.append(fact)
    bad = sum(fact["bad"] for fact in facts)
    if bad:
        ordered = sorted(facts, key=lambda fact: int(fact["start"]))
        shown = [text for fact in ordered for text in fact["shown"]][:MAX_SHOWN]
        more = f"\n  and {bad - len(shown):,} more" if bad > len(shown) else ""
        raise DataError(
            f"{bad:,} of {total:,} queries can not be answered, and nothing was written:\n  "
            + "\n  ".join(shown)
            + more
        )


def _checked_fields(generation: Generation, fields: list[str]) -> list[str]:
    check_fields(fields, [name for name in generation.items.fields if name not in LIST_COLUMNS])
    return fields


def _among(
    generation: Generation, filter: dict[str, Any], allowed: list[str] | None, excluded: list[str] | None
) -> Allowed | None:
    """Return the items that the whole run may recommend, None for all, and say how many they are."""
    for setting, ids in (("--allow-items", allowed), ("--exclude-items", excluded)):
        if ids is not None:
            unknown = int((generation.item_ids.rows(ids, missing="negative") < 0).sum())
            if unknown:
                say(f"{setting}: {unknown:,} of {len(ids):,} ids are not known, and are passed over")
    try:
        among = allowed_items(generation, filter, allowed, excluded or ())
    except NotAllowedError as error:
        raise ConfigError(f"recommend.{error}") from None
    if among is None:
        return None
    count = int(among.contains(generation.answerable_rows()).sum())
    if not count:
        raise ConfigError(
            "recommend.filter, --allow-items and --exclude-items leave none of the "
            f"{generation.num_items:,} items; allow at least one"
        )
    say(f"{count:,} of {generation.num_items:,} items may be recommended")
    return among

"""List, inspect, verify, publish, roll back and prune the generations of a configuration.

python -m jobs.generations list --config configs/movielens.yaml
python -m jobs.generations inspect [ID] --config configs/movielens.yaml
python -m jobs.generations verify [ID] --config configs/movielens.yaml
python -m jobs.generations publish ID [--pointer candidate] [--force] --config configs/movielens.yaml
python -m jobs.generations rollback [--pointer CURRENT] --config configs/movielens.yaml
python -m jobs.generations prune --keep 5 [--dry-run] --config configs/movielens.yaml
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jobs import command, stages
from twotower.config import Config
from twotower.errors import ConfigError
from twotower.progress import say

_HOUR_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=list(_ACTIONS), help="what to do")
    parser.add_argument("id", nargs="?", help="generation to publish, inspect or verify (the published one)")
    parser.add_argument("--pointer", default="CURRENT", help="pointer to publish or roll back (CURRENT)")
    parser.add_argument("--force", action="store_true", help="publish whatever speaks against it")
    parser.add_argument(
        "--keep", type=int, metavar="N", help="newest generations that stay (storage.keep_generations)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what prune would remove")
    parser.add_argument(
        "--grace-hours",
        type=float,
        metavar="H",
        default=24.0,
        help="age of leftovers of killed builds that prune removes (24)",
    )


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    store = stages.store_of(config)
    store.require()
    if arguments.action in ("list", "rollback", "prune"):
        for sentence in store.passed_over():
            say(f"passed over: {sentence}")
    return _ACTIONS[arguments.action](config, arguments)


def _list(config: Config, arguments: argparse.Namespace) -> command.Result:
    store = stages.store_of(config)
    pointers = store.pointers()
    lines, rows = [], []
    for name, manifest in store.manifests().items():
        delta = manifest.get("delta")
        row = {
            "id": name,
            "created": manifest["created"],
            "num_items": manifest["num_items"],
            "index_recall": manifest["index"]["index_recall"],
            "base": None if delta is None else delta["base"],
            "pointers": [pointer for pointer, named in pointers.items() if named == name],
        }
        rows.append(row)
        kind = "full build" if delta is None else f"update of {delta['base']}"
        mark = f"  <- {', '.join(row['pointers'])}" if row["pointers"] else ""
        counted = f"{row['num_items']:>9,} items  index recall {row['index_recall']:.4f}  {kind}"
        lines.append(f"{name}  {row['created']}  {counted}{mark}")
    details = {"pointers": pointers, "generations": rows, "passed_over": store.passed_over()}
    return command.Result(
        path=store.where, details=details, lines=lines or [f"{store.where} has no generations"]
    )


def _inspect(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.lifecycle.measurement import curve_table

    store = stages.store_of(config)
    path = stages.generation_for(config, arguments.id)
    manifest = store.manifest(path.name)
    index, delta, files = manifest["index"], manifest.get("delta"), manifest["files"]
    shared = {
        other: _shared_bytes(files, its["files"])
        for other, its in store.manifests().items()
        if other != path.name
    }
    shared = {other: num_bytes for other, num_bytes in shared.items() if num_bytes}
    named = [pointer for pointer, name in store.pointers().items() if name == path.name]
    lines = [
        f"generation {path.name}  ({', '.join(named) or 'no pointer names it'})",
        f"  created      {manifest['created']}",
        f"  items        {manifest['num_items']:,} x {manifest['embedding_dim']}, {manifest['metric']}",
        f"  checkpoint   {manifest['checkpoint_fingerprint']}",
        f"  dataset      {manifest['dataset_fingerprint']}",
        f"  files        {len(files):,}, {_mb(sum(f['bytes'] for f in files.values()))}",
        f"  index        {index['factory']}: {index.get('reason', 'as configured')}",
        f"  index recall {index['index_recall']:.4f} of the top {index['recall_k']} of "
        f"{index['num_queries']} real queries, target {index['target_index_recall']}",
        *(f"    {line}" for line in curve_table(index)),
        *_shards(manifest),
    ]
    if delta is not None:
        counts = ", ".join(f"{delta[what]:,} {what}" for what in ("added", "changed", "deleted"))
        lines.append(f"  update       of {delta['base']}: items {counts} ({delta['share']:.2%} of the build)")
    lines += [f"  shares       {_mb(num_bytes)} with {other}" for other, num_bytes in shared.items()]
    details = {
        "generation": path.name,
        "pointers": named,
        "shared_bytes": shared,
        **{name: manifest[name] for name in ("created", "num_items", "index", "shards")},
        "delta": delta,
    }
    return command.Result(path=path, metrics=stages.index_metrics(path), details=details, lines=lines)


def _shards(manifest: dict[str, Any]) -> list[str]:
    lines = ["  shard       role          rows  index           bytes"]
    for shard in manifest["shards"]:
        name = shard["name"]
        files = [f["bytes"] for path, f in manifest["files"].items() if path.startswith(f"shards/{name}/")]
        lines.append(
            f"    {name:<9} {shard['role']:<9} {shard['rows']:>9,}  {shard['factory']:<14}  {_mb(sum(files))}"
        )
    return lines


def _shared_bytes(files: dict[str, Any], others: dict[str, Any]) -> int:
    known = {facts["sha256"] for facts in others.values()}
    return sum(facts["bytes"] for facts in files.values() if facts["sha256"] in known)


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"


def _verify(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.generations.generation import Generation

    path = stages.generation_for(config, arguments.id)
    Generation.open(path, verify=True)
    lines = [f"{path.name}: every file has the size and SHA-256 of its manifest"]
    return command.Result(path=path, details={"generation": path.name, "verified": True}, lines=lines)


def _publish(config: Config, arguments: argparse.Namespace) -> command.Result:
    if arguments.id is None:
        raise ConfigError("publish needs the id of a generation; python -m jobs.generations list shows them")
    path = stages.generation_for(config, arguments.id)
    stages.publish(config, path.name, arguments.pointer, arguments.force)
    details = {"generation": path.name, "pointer": arguments.pointer}
    return command.Result(path=path, details=details, lines=[f"{arguments.pointer} -> {path.name}"])


def _rollback(config: Config, arguments: argparse.Namespace) -> command.Result:
    store = stages.store_of(config)
    done = store.rollback(arguments.pointer)
    lines = [f"{done.pointer} -> {done.id}, rolled back from {done.previous}"]
    details = {"generation": done.id, "pointer": done.pointer, "previous": done.previous}
    return command.Result(path=store.path(done.id), details=details, lines=lines)


def _prune(config: Config, arguments: argparse.Namespace) -> command.Result:
    keep = arguments.keep if arguments.keep is not None else config.storage.keep_generations
    if keep is None:
        raise ConfigError("prune needs --keep N, or storage.keep_generations in the configuration")
    if not arguments.grace_hours >= 0:
        raise ConfigError(f"--grace-hours {arguments.grace_hours}: it must not be negative")
    store = stages.store_of(config)
    pruned = store.prune(keep, arguments.grace_hours * _HOUR_S, arguments.dry_run)
    would = "would remove" if arguments.dry_run else "removed"
    lines = [f"{would} generation {name}" for name in pruned.generations]
    lines += [f"{would} {name}, left by a killed run" for name in pruned.leftovers]
    lines.append(f"{_mb(pruned.num_bytes)} {'would become' if arguments.dry_run else 'became'} free")
    details = {
        "removed": pruned.generations,
        "leftovers": pruned.leftovers,
        "freed_bytes": pruned.num_bytes,
        "dry_run": arguments.dry_run,
    }
    return command.Result(path=store.where, details=details, lines=lines)


_ACTIONS = {
    "list": _list,
    "inspect": _inspect,
    "verify": _verify,
    "publish": _publish,
    "rollback": _rollback,
    "prune": _prune,
}


JOB = command.Job("generations", __doc__, work, add_arguments)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())

"""List, publish or verify the generations of a configuration.

python -m jobs.generations list --config configs/movielens.yaml
python -m jobs.generations publish ID --config configs/movielens.yaml
python -m jobs.generations verify --config configs/movielens.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import command, stages
from twotower.artefacts import read_manifest
from twotower.config import Config
from twotower.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "publish", "verify"], help="what to do")
    parser.add_argument("id", nargs="?", help="generation to publish, or to verify (the published one)")
    parser.add_argument("--pointer", default="CURRENT", help="pointer to publish under (CURRENT)")
    parser.add_argument(
        "--force", action="store_true", help="publish although index recall is below the target"
    )


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    action = {"list": _list, "publish": _publish, "verify": _verify}[arguments.action]
    return action(config, arguments)


def _list(config: Config, arguments: argparse.Namespace) -> command.Result:
    store = stages.store_of(config)
    current = store.current(arguments.pointer)
    lines, rows = [], []
    for name in store.generations():
        manifest = read_manifest(store.path(name), "generation")
        recall = manifest["index"]["index_recall"]
        row = {
            "id": name,
            "created": manifest["created"],
            "num_items": manifest["num_items"],
            "index_recall": recall,
        }
        rows.append(row)
        mark = f"  <- {arguments.pointer}" if name == current else ""
        counted = f"{row['num_items']:>9,} items  index recall {recall:.4f}"
        lines.append(f"{name}  {row['created']}  {counted}{mark}")
    details = {"pointer": arguments.pointer, "current": current, "generations": rows}
    return command.Result(
        path=config.store, details=details, lines=lines or [f"{config.store} has no generations"]
    )


def _publish(config: Config, arguments: argparse.Namespace) -> command.Result:
    if arguments.id is None:
        raise ConfigError("publish needs the id of a generation; python -m jobs.generations list shows them")
    path = stages.generation_for(config, arguments.id)
    stages.store_of(config).publish(path.name, pointer=arguments.pointer, force=arguments.force)
    details = {"generation": path.name, "pointer": arguments.pointer}
    return command.Result(path=path, details=details, lines=[f"{arguments.pointer} -> {path.name}"])


def _verify(config: Config, arguments: argparse.Namespace) -> command.Result:
    from twotower.retrieval.generation import Generation

    path = stages.generation_for(config, arguments.id)
    Generation.open(path, verify=True)
    lines = [f"{path.name}: every file has the size and SHA-256 of its manifest"]
    return command.Result(path=path, details={"generation": path.name, "verified": True}, lines=lines)


def main(argv: Sequence[str] | None = None) -> int:
    return command.run("generations", __doc__, work, add_arguments, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Offline recommendation for tests: small parts, and a run that dies after two of them."""

from __future__ import annotations

import copy
import json
import signal
from pathlib import Path
from typing import Any

from tests.apart import run_apart
from twotower.config import Config, parse_config


def recommend_config(
    config: Config, root: Path | str, k: int, actors: int = 1, **sections: dict[str, Any]
) -> Config:
    """Return a configuration that writes several parts, the same with any number of actors."""
    values = copy.deepcopy(config.to_json())
    values["storage"]["root"] = str(root)
    values["cluster"] |= {"num_encoders": actors, "encode_batch_size": 8}
    values["recommend"]["k"] = k
    for name, changes in sections.items():
        values[name] |= changes
    return parse_config(values)


_KILLED = """
import contextlib, json, os, sys
import pyarrow as pa
from twotower.cluster import recommend as module
from twotower.cluster.recommend_parts import Recommend
from twotower.config import parse_config

def work_through(worker, settings, parts, config, gpu):
    # The actor's own class in this process: two parts, then the job dies without a word.
    actor = worker(**settings, device="cpu", threads=1)
    for number, part in enumerate(parts):
        if worker is Recommend and number == 2:
            os.kill(os.getpid(), 9)
        yield from actor(pa.table({k: [v] for k, v in part.items()})).to_pylist()

module.work_through = work_through
module.session = lambda config: contextlib.nullcontext()
module.recommend(parse_config(json.load(open(sys.argv[1]))), sys.argv[2], *sys.argv[3:])
"""


def run_until_killed(config: Config, generation: Path, folder: Path, *more: str) -> None:
    """Recommend in a process of its own, which SIGKILL ends when two parts are written."""
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    done = run_apart(_KILLED, folder / "config.json", generation, *more)
    assert done.returncode == -signal.SIGKILL, done.stderr

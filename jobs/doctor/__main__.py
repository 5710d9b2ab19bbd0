"""Look at this machine, its packages and its settings, and say what to do where something is wrong.

python -m jobs.doctor
python -m jobs.doctor --config mine.yaml --json

Every line is ok, a warning or a problem. The exit code is 1 where there is a problem, else 0. Nothing is
started, stopped or changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator

from jobs import command
from jobs.doctor import machine, running, software
from jobs.doctor.findings import Finding
from twotower.cluster import place
from twotower.config import Config


def examine(config: Config) -> Iterator[Finding]:
    """Yield everything that is found.

    Args:
        config: names the storage root, the service's port and the training workers.
    """
    limits = machine.cgroup_limits()
    yield from software.packages()
    yield software.instructions()
    yield from machine.processors(config, limits)
    yield from machine.threads(os.environ, limits)
    yield from software.gpus()
    yield machine.memory(limits)
    yield machine.shared_memory()
    yield from machine.disks(config, place.folder())
    yield machine.open_files()
    yield from running.ports(config, os.environ)
    yield from running.processes(running.programs(), place.running_cluster())
    yield from running.environment(os.environ)


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    found = list(examine(config))
    counts = {state: sum(f.state == state for f in found) for state in ("ok", "warning", "problem")}
    width = max(len(f.name) for f in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.state:<8} {finding.name:<{width}}  {finding.value}")
        if finding.remedy is not None:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    lines += ["", ", ".join(f"{count} {state}" for state, count in counts.items())]
    return command.Result(
        details={**counts, "findings": [dataclasses.asdict(finding) for finding in found]},
        lines=lines,
        exit_code=1 if counts["problem"] else 0,
    )


JOB = command.Job("doctor", __doc__, work, local=True)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())

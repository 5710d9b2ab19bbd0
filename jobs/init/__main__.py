"""Look at your own files and write a configuration for them, with the reason for each guess.

python -m jobs.init ratings.csv movies.csv
python -m jobs.init events/ products.parquet --output mine.yaml

FILES are CSV or Parquet: files, folders or globs. Which is the log of interactions, which describes items and
which users is guessed from names of columns and from their values; so is what each column is. The guesses
are tried out with the readers of prepare, on the first rows. What could not be told, or could be otherwise,
is said, and stands at the top of the file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from jobs import command
from jobs.init.check import check
from jobs.init.document import document
from jobs.init.look import look
from jobs.init.plan import Plan, plan, scenario
from jobs.init.roles import roles
from twotower import progress
from twotower.artefacts import write_bytes
from twotower.config import Config, parse_config
from twotower.config.values import read_document
from twotower.errors import ConfigError

_MAX_ROWS = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILES", nargs="+", help="CSV or Parquet files, folders or globs")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("config.yaml"),
        help="what is written (config.yaml)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    parser.add_argument("--name", help="name of the scenario (that of the file, or of the log)")
    parser.add_argument(
        "--rows",
        metavar="N",
        type=int,
        default=_MAX_ROWS,
        help=f"rows of a table that are looked at ({_MAX_ROWS:,})",
    )


def work(config: Config, arguments: argparse.Namespace) -> command.Result:
    output: Path = arguments.output
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; give the path of a file")
    if output.exists() and not arguments.force:
        raise ConfigError(f"{output} is there already; --force overwrites it, --output names another file")
    if arguments.rows < 1:
        raise ConfigError(f"--rows {arguments.rows}: it must be at least 1")
    progress.stage("look at the files")
    tables = look(arguments.files, arguments.rows)
    for table in tables:
        progress.say(f"{table.path}: {table.size}, columns {', '.join(table.columns)}")
    name = arguments.name or (None if output.stem == "config" else output.stem)
    made = plan(roles(tables), name if name is None else scenario(name))
    progress.stage("try the guesses")
    with progress.quieted():
        check(made, arguments.rows)
    called = shlex.join(["twotower", "init", *arguments.files, *_output(output)])
    text = document(made, called, str(output))
    # What was checked is what the file says.
    read_document(text, str(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, text.encode())
    for sentence in made.unsure:
        progress.say(f"not sure: {sentence}")
    return command.Result(path=output, details=_details(made), lines=_lines(made, output))


def _output(output: Path) -> list[str]:
    return [] if output == Path("config.yaml") else ["--output", str(output)]


def _details(made: Plan) -> dict[str, object]:
    return {
        "config": parse_config(made.values()).data.source.model_dump(mode="json", exclude_defaults=True),
        "features": {"query": made.query, "item": made.item},
        "attributes": made.attributes,
        "unsure": made.unsure,
    }


def _lines(made: Plan, output: Path) -> list[str]:
    log = made.log
    columns = ", ".join(f"{role} {name}" for role, name in made.source["columns"].items())
    lines = [f"log    {log.table.path}: {columns}"]
    for noun, side in (("items", made.roles.items), ("users", made.roles.users)):
        if side is not None:
            title = f", title {made.title.name}" if noun == "items" and made.title is not None else ""
            lines.append(f"{noun}  {side.table.path}: id {side.key.name}{title}")
    doubts = f"; {len(made.unsure)} things to look at stand at its top" if made.unsure else ""
    return [*lines, f"wrote  {output}{doubts}", f"next   twotower pipeline --config {output}"]


JOB = command.Job("init", __doc__, work, add_arguments, reads_config=False, local=True)
main, parser = JOB.run, JOB.parser


if __name__ == "__main__":
    sys.exit(main())

"""The configuration as YAML, with the reason for each guess beside it."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from jobs.init.features import Use
from jobs.init.plan import Plan

_COLUMN = 50
"""Where comments begin, if what they are about is not longer."""
_WIDTH = 118


class Document:
    """Lines of YAML with comments."""

    def __init__(self) -> None:
        """Start empty."""
        self.lines: list[str] = []

    def add(self, text: str, comment: str = "") -> None:
        """Add a line, and a comment behind it, or above it where it is too long."""
        comment = "".join(c if c.isprintable() else " " for c in " ".join(comment.split()))
        beside = f"{text:<{_COLUMN}}  # {comment}" if len(text) <= _COLUMN else f"{text}  # {comment}"
        if not comment:
            self.lines.append(text)
        elif len(beside) <= _WIDTH:
            self.lines.append(beside)
        else:
            self.note(comment, len(text) - len(text.lstrip()))
            self.lines.append(text)

    def note(self, comment: str, indent: int = 0, mark: str = "") -> None:
        """Add lines of comment alone."""
        comment = "".join(c if c.isprintable() else " " for c in " ".join(comment.split()))
        margin = " " * indent + "# "
        self.lines += textwrap.wrap(
            comment,
            _WIDTH,
            initial_indent=margin + mark,
            subsequent_indent=margin + " " * len(mark),
            break_long_words=False,
            break_on_hyphens=False,
        )


def flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1 << 30)
    return text.strip().removesuffix("...").strip()


def document(made: Plan, command: str, output: str) -> str:
    """Return the text of a configuration file.

    Args:
        made: what is written.
        command: that made it.
        output: name of the file.
    """
    out = Document()
    out.note(f"Written by `{command}`. Look through the guesses; then")
    out.note(f"twotower pipeline --config {output}", mark="  ")
    out.note("Every key with its meaning: twotower pipeline --help, and configs/own-data.yaml.")
    if made.unsure:
        out.note("")
        out.lines.append("#")
        out.note("What could not be told, or could be otherwise:")
        for sentence in made.unsure:
            out.note(sentence, mark="- ")
    out.add("")
    out.add(f"name: {flow(made.name)}", "artefacts are in runs/NAME")
    out.add("")
    _data(out, made)
    out.add("")
    out.add(f"split: {flow(made.split)}", made.split_why)
    out.add("")
    _features(out, made)
    out.add("")
    out.add(f"model: {{embedding_dim: {made.dim}}}", f"for {made.num_items:,} items; as wide as the ids")
    if made.positives.get("weight") == "scaled":
        out.add(
            "train: {loss: {weights: none}}", "how high a value is weighs in profiles, and not in the loss"
        )
    _index(out, made)
    return "\n".join(out.lines) + "\n"


def _data(out: Document, made: Plan) -> None:
    log, source = made.log, made.source
    out.add("data:")
    out.add("  source:")
    out.add("    kind: files")
    out.add(f"    interactions: {flow(log.table.path)}", log.table.size)
    if "encoding" in source:
        out.add(f"    encoding: {source['encoding']}", "the files are not UTF-8")
    out.add("    columns:")
    out.add(f"      user: {flow(log.user.name)}", log.user.describe())
    out.add(f"      item: {flow(log.item.name)}", log.item.describe())
    if log.time is not None and log.clock is not None:
        days = ", whole days only" if log.clock.days_only else ""
        out.add(f"      time: {flow(log.time.name)}", f"{log.clock.why}{days}; {log.time.describe()}")
        for key, value in (("time_unit", log.clock.unit), ("time_format", log.clock.format)):
            if value is not None:
                out.add(f"      {key}: {flow(value)}")
    if log.event is not None:
        out.add(f"      event: {flow(log.event.name)}", log.event.describe())
    if log.value is not None:
        mark = "" if made.value_used else "# "
        out.add(f"      {mark}value: {flow(log.value.name)}", made.value_why)
    if made.events and log.event is not None:
        out.note("weight in the loss and in histories, or negative, or seen_only", 4)
        out.add("    events:")
        for name, meaning in made.events.items():
            out.add(f"      {flow(name)}: {flow(meaning)}", f"{log.event.counts[name]:,} rows")
    for noun, side in (("items", made.roles.items), ("users", made.roles.users)):
        if side is not None:
            out.add(
                f"    {noun}: {flow(source[noun])}", f"{side.table.size}, {side.known:.0%} of the log's ids"
            )
    if made.positives:
        out.add(f"  positives: {flow(made.positives)}", made.value_why)
    out.add(f"  on_bad_rows: {made.on_bad_rows}", made.bad_why)
    out.add(
        "  # repeats: last",
        "of a user and item; keep: every one, to buy again",
    )


def _features(out: Document, made: Plan) -> None:
    reasons = {use.feature["name"]: use for use in (*made.items, *made.users) if use.feature is not None}
    out.add("features:")
    out.add("  query:")
    for feature in made.query:
        own = feature["type"] in ("history", "profile")
        why = {"history": "what a user had last", "profile": "shares of it in the history"}
        comment = why[feature["type"]] if own else reasons[feature["name"]].why
        out.add(f"    - {flow(feature)}", comment)
    _left(out, made.users)
    out.add("  item:")
    for feature in made.item:
        known = reasons.get(feature["name"]) if feature["type"] != "id" else None
        out.add(f"    - {flow(feature)}", f"{made.num_items:,} items" if known is None else known.why)
    _left(out, made.items)


def _left(out: Document, uses: list[Use]) -> None:
    for use in uses:
        if use.feature is None:
            out.note(f"{use.column.name} is no feature: {use.why}", 4)


def _index(out: Document, made: Plan) -> None:
    if not made.attributes:
        return
    out.add("")
    out.add("index:")
    out.add("  attributes:", "columns of the item table that queries can filter by")
    why = {use.column.name: use.why for use in made.items}
    for name, attribute in made.attributes.items():
        out.add(f"    {flow(name)}: {flow(attribute)}", why[name])

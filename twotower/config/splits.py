"""Section of the split: how interactions are held out, and what each kind of split needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from twotower.config.section import Section, Share
from twotower.registry import NameIn, Registry


@dataclass(frozen=True)
class SplitKind:
    """A kind of split, as far as a configuration has to know it."""

    assign: str | Callable[..., Any]
    """What assigns the splits, an ``Assign`` of ``twotower.data.splits``; a text "module:name" is imported
    when data are prepared."""
    rule: str
    """The same for people, a sentence; ``{test:.0%}`` and ``{validation:.0%}`` stand for the shares."""
    needs_times: bool = False
    """Whether it can not be made of interactions without times."""
    needs_given: bool = False
    """Whether the source has to say the split of each interaction."""
    uses_seed: bool = False
    """Whether another ``seed`` makes another split, and so another dataset."""


SPLIT_KINDS: Registry[SplitKind] = Registry("a kind of split")
"""The kinds of ``split.kind``."""
SPLIT_KINDS.add(
    "temporal_user",
    SplitKind(
        "twotower.data.splits:temporal_user",
        "The last {test:.0%} of each user's interactions are test, the last {validation:.0%} of the rest "
        "validate.",
        needs_times=True,
    ),
)
SPLIT_KINDS.add(
    "temporal_global",
    SplitKind(
        "twotower.data.splits:temporal_global",
        "What comes after one moment is test ({test:.0%}), and after an earlier one validation "
        "({validation:.0%} of the rest).",
        needs_times=True,
    ),
)
SPLIT_KINDS.add(
    "leave_one_out",
    SplitKind(
        "twotower.data.splits:leave_one_out",
        "The last interaction of each user is test, the one before it validates.",
        needs_times=True,
    ),
)
SPLIT_KINDS.add(
    "random",
    SplitKind(
        "twotower.data.splits:at_random",
        "{test:.0%} of the interactions of each user, drawn at random, are test, {validation:.0%} of the "
        "rest validate.",
        uses_seed=True,
    ),
)
SPLIT_KINDS.add(
    "given",
    SplitKind(
        "twotower.data.splits:as_given",
        "The data says which interactions are train, validation and test.",
        needs_given=True,
        # One without a validation part has it drawn where there are no times.
        uses_seed=True,
    ),
)


@SPLIT_KINDS.model
class SplitConfig(Section):
    """How interactions are held out for test and validation."""

    kind: Annotated[str, NameIn(SPLIT_KINDS)] = "temporal_user"
    """Held out: each user's last; all after one moment; each user's last one; at random; as the data says."""
    test_share: Share = 0.2
    """Share of test; per user it is ceil(share x n)."""
    validation_share: Share = 0.1
    """Share of the rest that validates (the last part of train)."""
    ties: Literal["together", "order"] = "together"
    """Interactions of one user at one time, such as a basket: a moment that no split by time parts and in
    which nothing comes first; or in the order of the rows in the source."""

    def needs_times_message(self) -> str:
        """Return what is wrong where the kind needs times and the source has none."""
        others = " or ".join(name for name in SPLIT_KINDS.names if not SPLIT_KINDS[name].needs_times)
        return f"split.kind: {self.kind} needs times, and the source has none; use {others}"

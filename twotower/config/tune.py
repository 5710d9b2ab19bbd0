"""Section of sweeps: which settings to try, and when a trial is given up."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from twotower.config.section import PositiveInt, Section

Range = Annotated[list[float], Field(min_length=2, max_length=2)]


class ParameterConfig(Section):
    """What is tried of one key: all ``values``, or draws from ``choice``, ``uniform`` or ``log_uniform``."""

    values: Annotated[list[Any], Field(min_length=1)] | None = None
    """Every one is tried, with every combination of the others."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One is drawn for each sample."""
    uniform: Range | None = None
    """[smallest, largest]; a number between them is drawn for each sample."""
    log_uniform: Range | None = None
    """[smallest, largest], both above 0; the same with an evenly spread logarithm."""
    multiple_of: PositiveInt | None = None
    """Draws of a range are rounded to whole multiples of this, for keys that take integers."""

    @property
    def is_drawn(self) -> bool:
        """Whether values are drawn, so that ``samples`` says how many."""
        return self.values is None

    @property
    def listed(self) -> list[Any] | None:
        """The listed values, of a grid or to draw from; None for a range."""
        return self.choice if self.values is None else self.values

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest value of a range."""
        low, high = self.uniform or self.log_uniform or [-math.inf, math.inf]
        return low, high

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [n for n in ("values", "choice", "uniform", "log_uniform") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a parameter has exactly one of values, choice, uniform and log_uniform, and this one has "
                f"{' and '.join(given) or 'none'}"
            )
        if self.listed is not None:
            if self.multiple_of is not None:
                raise ValueError(f"multiple_of ({self.multiple_of}) has no effect on {given[0]}; remove it")
            repeated = [v for i, v in enumerate(self.listed) if v in self.listed[:i]]
            if repeated:
                raise ValueError(f"{given[0]} names {repeated[0]!r} more than once; name it once")
            return self
        low, high = self.bounds
        if low >= high:
            raise ValueError(f"{given[0]} [{low}, {high}] must be [smallest, largest]")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform [{low}, {high}] must begin above 0; use uniform")
        step = self.multiple_of
        if step is not None and math.ceil(low / step) > math.floor(high / step):
            raise ValueError(
                f"{given[0]} [{low}, {high}] holds no multiple of multiple_of ({step}); widen the range"
            )
        return self


class TuneConfig(Section):
    """A sweep: trainings with different settings, compared by the validation metric."""

    parameters: dict[str, ParameterConfig] = {}
    """What to try, by dotted key: {train.loss.temperature: {values: [0.05, 0.1]}}. Keys of seed, data, split,
    features, model and train."""
    samples: PositiveInt = 1
    """Draws of the parameters that are drawn, for each combination of the others."""
    scheduler: Literal["asha", "none"] = "asha"
    """Asynchronous successive halving gives hopeless trials up early; none trains all to the end."""
    grace_epochs: PositiveInt = 1
    """Epochs of a trial before ASHA may stop it."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of the trials that ASHA compares after grace_epochs x reduction_factor^n epochs, about one in so many
    goes on."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; as many as the cluster has room for when not given, and never more."""

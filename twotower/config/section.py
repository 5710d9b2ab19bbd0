"""What every section of the configuration is: strict, frozen, with docstrings as help texts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from twotower.schema import STRICT

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(**STRICT, allow_inf_nan=False)

"""Registries: the types of features, losses, splits, sources and the like that a configuration can name.

A registry maps a name to an entry. What the configuration accepts is read from it, so that an entry that is
added appears in validation, in error messages and in ``--help`` without any other change.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar, Union

from pydantic import BaseModel, Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

T = TypeVar("T")
M = TypeVar("M", bound=type[BaseModel])
C = TypeVar("C")

_validators: list[Any] = []


def of_registries(validators: C) -> C:
    """Note a functools cache of what validates by registries: it is emptied when one of them changes."""
    _validators.append(validators)
    return validators


class Registry(Generic[T]):
    """Entries by name, in the order in which they were added.

    Example:
        >>> colours = Registry[str]("a colour")
        >>> colours.add("red", "#f00")
        '#f00'
        >>> colours.names, colours["red"]
        (('red',), '#f00')
    """

    def __init__(self, what: str) -> None:
        """Begin with no entry.

        Args:
            what: an entry is, with its article, for messages.
        """
        self._what = what
        self._entries: dict[str, T] = {}
        self._models: list[type[BaseModel]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[T]:
        """Yield the entries."""
        return iter(tuple(self._entries.values()))

    def __contains__(self, name: str) -> bool:
        """Return whether there is an entry of that name."""
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        """Return an entry.

        Raises:
            KeyError: there is none of that name.
        """
        if name not in self._entries:
            raise KeyError(f"{name!r} is not {self._what}; there are {', '.join(self._entries)}")
        return self._entries[name]

    def add(self, name: str, entry: T) -> T:
        """Add an entry, and let the configuration accept its name; returns the entry.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{name!r} is already {self._what}; choose another name")
        self._entries[name] = entry
        try:
            self._rebuild()
        except Exception:
            # What the configuration can not be built with would refuse every later entry too.
            self.remove(name)
            raise
        return entry

    def remove(self, name: str) -> None:
        """Take an entry out again, such as at the end of a test."""
        del self._entries[name]
        self._rebuild()

    def model(self, model: M) -> M:
        """Note a pydantic model that validates names or entries of this registry; a class decorator.

        Models are noted in the order of their definition: one that contains another comes after it.
        """
        self._models.append(model)
        return model

    def _rebuild(self) -> None:
        for model in self._models:
            model.model_rebuild(force=True)
        for validators in _validators:
            validators.cache_clear()


class Accepted:
    """Annotation of a field whose allowed values are those of a registry at the time of validation."""

    def annotation(self) -> Any:
        """Return the type of the values that are allowed now."""
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate as the type of the values that are allowed now; pydantic calls it."""
        return handler.generate_schema(self.annotation())


@dataclass(frozen=True, eq=False)
class NameIn(Accepted):
    """One of the names of a registry."""

    registry: Registry[Any]
    also: tuple[str, ...] = ()
    """Further names, which come first."""

    def annotation(self) -> Any:
        """Return the Literal of the names."""
        return Literal[(*self.also, *self.registry.names)]


@dataclass(frozen=True, eq=False)
class ModelIn(Accepted):
    """An instance of one of the models of a registry, told apart by a field with its name."""

    registry: Registry[Any]
    tag: str
    """Name of that field."""
    allowed: Callable[[Any], bool] = lambda model: True
    """Which of the models are allowed here."""

    def annotation(self) -> Any:
        """Return the union of the models."""
        models = tuple(model for model in self.registry if self.allowed(model))
        return Annotated[Union[models], Field(discriminator=self.tag)]  # noqa: UP007


def annotation_of(info: FieldInfo) -> Any:
    """Return the annotation of a field, with the values of a registry that are allowed now."""
    return next((m.annotation() for m in info.metadata if isinstance(m, Accepted)), info.annotation)


def imported(entry: Any) -> Any:
    """Return what a text "module:name" or "module:Class.name" names, imported now; others as they are."""
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))

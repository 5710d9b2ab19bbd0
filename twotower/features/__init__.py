"""The types of features, one class and one file each, in the registry ``FEATURES``.

Every file of this folder is imported here, so that a new type is one new file; ``docs/extending.md`` walks
through one. ``base`` says what a type is.
"""

import importlib
import pkgutil

from twotower.features.base import FEATURES, ColumnFeature, Feature, feature_type

_IN_ORDER = ("ids", "categorical", "multi_hot", "numeric", "text", "vector", "history", "profile")
"""The order of help and messages; types of other files come behind these."""
_HELPERS = ("base", "columns", "numbers")
"""Files that are no type: the protocol, and two that load numpy and pyarrow."""

_found = sorted(module.name for module in pkgutil.iter_modules(__path__))
for _name in (*_IN_ORDER, *_found):
    if _name not in _HELPERS:
        importlib.import_module(f"{__name__}.{_name}")

__all__ = ["FEATURES", "ColumnFeature", "Feature", "feature_type"]

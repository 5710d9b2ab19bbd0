"""The configuration: strict models, one YAML file, dotted overrides.

Every field's docstring is its help text. Unknown keys are refused with the nearest valid name.
"""

from twotower.config.data import (
    DataConfig,
    FilesSource,
    GeneratedSource,
    LightGCNSource,
    MovieLensSource,
    Source,
    TableConfig,
)
from twotower.config.loading import load_config, parse_config, put_value, stored_config, text_of
from twotower.config.model import FeaturesConfig, ModelConfig, TowerConfig
from twotower.config.root import Config
from twotower.config.service import ApplicationConfig, AttributeConfig, LimitsConfig
from twotower.config.splits import SplitConfig

__all__ = [
    "ApplicationConfig",
    "AttributeConfig",
    "Config",
    "DataConfig",
    "FeaturesConfig",
    "FilesSource",
    "GeneratedSource",
    "LightGCNSource",
    "LimitsConfig",
    "ModelConfig",
    "MovieLensSource",
    "Source",
    "SplitConfig",
    "TableConfig",
    "TowerConfig",
    "load_config",
    "parse_config",
    "put_value",
    "stored_config",
    "text_of",
]

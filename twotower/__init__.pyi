"""The public names for type checkers; ``__init__.py`` imports each when it is first used."""

from twotower.client import Client as Client
from twotower.config import Config as Config
from twotower.config import load_config as load_config
from twotower.config.building import configure as configure
from twotower.data.dataset import Dataset as Dataset
from twotower.errors import TwotowerError as TwotowerError
from twotower.library import Report as Report
from twotower.library import build as build
from twotower.library import evaluate as evaluate
from twotower.library import prepare as prepare
from twotower.library import train as train
from twotower.pipeline.train import Checkpoints as Checkpoints
from twotower.retrieval.query import HistoryItem as HistoryItem
from twotower.retrieval.query import Query as Query
from twotower.retrieval.retriever import Retriever as Retriever

__version__: str
__all__: list[str]

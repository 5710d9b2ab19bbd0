"""Two-tower retrieval on Ray: interactions in, recommendations out.

``import twotower as tt`` loads nothing else: each name below is imported when it is first used.

Example:
    >>> import twotower as tt
    >>> "train" in dir(tt)
    True
"""

__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "Client",
    "Config",
    "Dataset",
    "HistoryItem",
    "Query",
    "Report",
    "Retriever",
    "TwotowerError",
    "__version__",
    "build",
    "configure",
    "evaluate",
    "load_config",
    "prepare",
    "train",
]

_MODULES = {
    "Checkpoints": "twotower.pipeline.train",
    "Client": "twotower.client",
    "Config": "twotower.config",
    "Dataset": "twotower.data.dataset",
    "HistoryItem": "twotower.retrieval.query",
    "Query": "twotower.retrieval.query",
    "Report": "twotower.library",
    "Retriever": "twotower.retrieval.retriever",
    "TwotowerError": "twotower.errors",
    "build": "twotower.library",
    "configure": "twotower.config.building",
    "evaluate": "twotower.library",
    "load_config": "twotower.config",
    "prepare": "twotower.library",
    "train": "twotower.library",
}
"""The module of each name; ``__init__.pyi`` says the same to type checkers."""


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted({*globals(), *__all__})

"""A built generation becomes the one that answers, where nothing speaks against it.

Every job imports this module, also one that publishes nothing: what loads torch or FAISS is imported inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower.config import Config
from twotower.data.dataset import Dataset
from twotower.errors import ArtefactError
from twotower.progress import say


def reasons_against(config: Config, dataset: Dataset, generation: Path) -> list[str]:
    """Compare a generation with the published one, on the test split of its dataset.

    Returns:
        for ``publish``: why it should not be published, each a sentence. Where there is nothing to compare
        it with, that is said and none are returned.
    """
    from twotower.generations.opening import open_store
    from twotower.retrieval.comparison import compare

    store = open_store(config)
    current = store.current()
    if current == generation.name:
        return []
    if current is None:
        found: Any = "none is published yet"
    else:
        try:
            repeats, k = config.evaluation.repeats, config.index.recall_k
            found = compare(dataset, generation, store.fetch(current), k, repeats, config.seed)
        except ArtefactError as error:
            found = f"the one in use can not be opened ({error})"
    if isinstance(found, str):
        say(f"recall is not compared with another generation: {found}")
        return []
    say(found.describe())
    reason = found.reason_against(config.index.max_recall_drop)
    return [] if reason is None else [reason]


def publish(
    config: Config,
    generation: str,
    pointer: str = "CURRENT",
    force: bool = False,
    reasons: Sequence[str] = (),
) -> None:
    """Publish a generation and remove those that ``storage.keep_generations`` no longer keeps.

    Raises:
        RefusedError: a gate or ``reasons`` speak against it, or another publisher was faster.
    """
    from twotower.generations.opening import open_store

    store = open_store(config)
    before = store.publish(generation, pointer, force=force, reasons=reasons)
    say(f"{pointer} names {generation}" + (f", before {before}" if before not in (None, generation) else ""))
    retain(config)


def retain(config: Config) -> None:
    """Remove the generations that ``storage.keep_generations`` does not keep; nothing where it is null."""
    from twotower.generations.opening import open_store

    if config.storage.keep_generations is not None:
        store = open_store(config)
        for sentence in store.passed_over():
            say(f"passed over: {sentence}")
        pruned = store.prune(config.storage.keep_generations)
        if pruned.generations or pruned.leftovers:
            say(
                f"removed {len(pruned.generations)} old generations and {len(pruned.leftovers)} leftovers: "
                f"{pruned.num_bytes / 1e6:,.1f} MB free"
            )

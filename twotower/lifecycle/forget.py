"""Users out of all below a storage root: datasets, checkpoints, generations, lists, reports, what kills left.

Datasets are replaced last, since only they say which rows of a checkpoint were whose. What is asked for is
written down first and removed last: a run that was killed is finished by the next one, whatever that is asked
for. Everything in between is either as it was or as it shall be. The vocabularies that knew the users are
superseded before generations are looked for: who publishes at the same time is either seen or refused.

Nothing else that reads or writes these artefacts may run meanwhile, which is checked as far as locks show it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from twotower.artefacts import building, lock_if_free, locked, remove, settle, write_json
from twotower.config import Config
from twotower.data.dataset import KIND as DATASET
from twotower.data.dataset import Dataset
from twotower.data.forget import Erasure, Forgetting
from twotower.errors import ArtefactError, DataError, RefusedError, UnavailableError
from twotower.generations.generation import Generation
from twotower.generations.prune import WORK
from twotower.generations.store import Store
from twotower.jsonfiles import check_shape, read_json
from twotower.lifecycle.forget_generation import Successors, blank_items, erasure_of
from twotower.lifecycle.forget_lists import Lists
from twotower.lifecycle.forget_reports import ReportedUsers
from twotower.listing import STORED
from twotower.model.checkpoint import checkpoint_manifest
from twotower.model.forget import KIND as CHECKPOINT
from twotower.model.forget import forget_in_checkpoint, knows_users
from twotower.progress import say

REQUEST = "forgetting.json"
"""What a run that has not ended is asked for."""
_ROUNDS = 5
_EXAMPLES = 5
UNREACHABLE = (
    "the raw data: remove the users there before anything is prepared from it again, or they are back",
    "services that run: they answer from what they have opened until they are started again",
    "copies elsewhere: backups, versions that a bucket keeps, the caches of other machines (their next fetch "
    "brings generations without the users; remove the old ones there)",
    "logs and traces of Ray and of services, and tracking servers",
    "what was learned from or counted over everybody: weights of towers, hashed tables, means, popularity",
)
"""What is not reached."""


@dataclass(frozen=True)
class Change:
    """What was removed from one artefact, or would be."""

    kind: str
    name: str
    removed: dict[str, int]
    """Counts by what they are of."""


@dataclass(frozen=True)
class Forgotten:
    """What a run did, or would do."""

    users: int
    """Different users asked for."""
    missing: int
    """Those that nothing here knows."""
    changes: list[Change]
    left: list[str]
    """What may still hold them, each a sentence."""


@dataclass
class _Plan:
    """Where the users are."""

    datasets: dict[Path, Erasure] = dataclasses.field(default_factory=dict)
    generations: dict[str, Erasure] = dataclasses.field(default_factory=dict)
    vocabularies: set[str] = dataclasses.field(default_factory=set)
    """Hashes of all that is there, with and without the users."""
    fingerprints: set[str] = dataclasses.field(default_factory=set)
    """Of the datasets of all that is there, with and without the users."""
    checkpoints: dict[Path, Erasure] = dataclasses.field(default_factory=dict)
    lists: list[Lists] = dataclasses.field(default_factory=list)
    reports: list[ReportedUsers] = dataclasses.field(default_factory=list)
    changes: list[Change] = dataclasses.field(default_factory=list)
    found: set[str] = dataclasses.field(default_factory=set)
    left: list[str] = dataclasses.field(default_factory=list)

    @property
    def erasures(self) -> list[Erasure]:
        """All of them, those of datasets first."""
        return [*self.datasets.values(), *self.generations.values()]


def forget_users(
    config: Config, store: Store, ids: Sequence[str], *, ignore_missing: bool = False, dry_run: bool = False
) -> Forgotten:
    """Remove users from all artefacts of a configuration.

    Args:
        config: names the folders.
        store: of its generations; those in a bucket come to its local folder on the way.
        ids: of users, as the source has them.
        ignore_missing: pass over ids that nothing here knows.
        dry_run: only say what would be removed.

    Raises:
        DataError: nothing knows an id, or a dataset has nothing but these users.
        RefusedError: a build, an update or another job is at work on an artefact, or a publisher comes
            between again and again. Run it again.
    """
    request = config.home / REQUEST
    with locked(config.home / ".forget.lock"):
        if at_work := busy(config, store):
            raise RefusedError(
                f"nothing is forgotten: other processes are at work on {', '.join(at_work[:_EXAMPLES])}. Run "
                "it again when they have ended"
            )
        pending = _pending(request)
        changes = []
        if pending:
            if dry_run:
                raise RefusedError(
                    f"a run that was killed has not forgotten all of {len(pending):,} users; finish it "
                    "first, by running it without --dry-run"
                )
            say(f"a run that was killed has not forgotten all of {len(pending):,} users; that is done now")
            # By itself: what it has done already follows from exactly these users.
            changes += _run(config, store, pending).changes
            request.unlink()
        plan = _plan(config, store, ids)
        missing = [i for i in dict.fromkeys(ids) if i not in plan.found and i not in pending]
        if missing and not ignore_missing:
            raise DataError(
                f"{len(missing):,} of {len(set(ids)):,} users are known nowhere below {config.home} and in "
                f"{store.where}: {', '.join(map(repr, missing[:_EXAMPLES]))}; they were forgotten before, or "
                "never there. Correct the ids, or pass over them with --ignore-missing"
            )
        if plan.found and not dry_run:
            write_json(request, {"users": list(dict.fromkeys(ids))})
            plan = _run(config, store, ids)
            request.unlink()
        left = plan.left
        if not dry_run:
            left += [f"{name} is being made by another process" for name in busy(config, store)]
    return Forgotten(len({*ids, *pending}), len(missing), changes + plan.changes, left)


class _Request(BaseModel):
    """What a run was asked for, as it is stored."""

    model_config = STORED

    users: list[str]


def _pending(request: Path) -> list[str]:
    """Return the users whom a run that was killed was to forget.

    Raises:
        ArtefactError: the file that says so is damaged.
    """
    for cut_short in request.parent.glob(f".{request.name}.*.tmp"):
        remove(cut_short)
    if not request.exists():
        return []
    remedy = "Remove it, and forget the users again whom that run was to forget."
    value = read_json(request, remedy)
    check_shape(value, _Request, str(request), remedy)
    return list(value["users"])


def _run(config: Config, store: Store, ids: Sequence[str]) -> _Plan:
    """Forget users, going on with what a run that was killed has left."""
    for folder in _folders(config):
        settle(folder)
    plan = _plan(config, store, ids)
    plan.changes += [Change("leftover", name, {}) for name in _remove_leftovers(config)]
    with contextlib.ExitStack() as stack:
        for path, erasure in plan.datasets.items():
            say(f"dataset {path.name}: {erasure.num_users:,} users")
            # It takes its place when the block ends.
            forgetting = Forgetting.of(Dataset.open(path), ids)
            assert forgetting is not None
            forgetting.write(stack.enter_context(building(path)))
        for path, erasure in plan.checkpoints.items():
            say(f"checkpoint {path.name}")
            with building(path) as partial:
                forget_in_checkpoint(path, partial, erasure)
        # Before generations, which may be all that says whose rows were whose.
        for report in plan.reports:
            say(f"report {report.path.name}: {len(report.found):,} example users, {report.num_rows:,} rows")
            with building(report.path) as partial:
                report.write(partial)
        if plan.erasures:
            store.supersede({erasure.old_hash for erasure in plan.erasures})
        _forget_generations(store, ids, plan)
        for lists in plan.lists:
            say(f"recommendations {lists.path.name}: {lists.num_rows:,} rows")
            with building(lists.path) as partial:
                lists.write(partial)
    return plan


def busy(config: Config, store: Store) -> list[str]:
    """Return what other processes of this machine are making, by their locks."""
    locks = [p for folder in _folders(config) for p in sorted(folder.glob(".*.lock"))]
    locks += sorted((store.root / "generations").glob(".*.lock")) + sorted((store.root / WORK).glob("*.lock"))
    held = []
    for lock in locks:
        with lock_if_free(lock) as free:
            if not free:
                held.append(str(lock.parent / lock.name.removeprefix(".").removesuffix(".lock")))
    return held


def _folders(config: Config) -> list[Path]:
    """Folders whose artefacts are built under a hidden name."""
    return [config.datasets, config.checkpoints, config.reports, config.recommendations]


T = TypeVar("T")


def _opened(folder: Path, read: Callable[[Path], T], plan: _Plan) -> Iterator[tuple[Path, T]]:
    """Yield the artefacts of a folder; what can not be read is left, and keeps nobody from the others."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.name.startswith("."):
            with _passing_over(plan):
                yield path, read(path)


@contextlib.contextmanager
def _passing_over(plan: _Plan) -> Iterator[None]:
    """Note what can not be read inside the block as left, and go on behind it."""
    try:
        yield
    except UnavailableError:
        raise
    except (ArtefactError, OSError, pa.ArrowException) as error:
        plan.left.append(f"what can not be read, and may hold the users: {error}")


def _plan(config: Config, store: Store, ids: Sequence[str]) -> _Plan:
    """Return where users are; nothing is changed."""
    plan = _Plan()
    plan.left += [f"what is no part of the store, and may hold the users: {s}" for s in store.passed_over()]
    for path, (dataset, forgetting) in _opened(config.datasets, lambda path: _dataset(path, ids), plan):
        plan.vocabularies.add(dataset.vocabulary_hash)
        plan.fingerprints.add(dataset.fingerprint)
        if forgetting is not None:
            plan.datasets[path] = forgetting.erasure
            plan.vocabularies.add(forgetting.erasure.new_hash)
            plan.found |= {i for i in ids if i in dataset.user_ids}
            counts = {
                "users": forgetting.erasure.num_users,
                "interactions": forgetting.num_interactions,
                "feature_values": sum(map(len, forgetting.erasure.values.values())),
                "item_ids": forgetting.num_item_ids,
            }
            plan.changes.append(Change(DATASET, path.name, counts))
    for name in store.generations():
        with _passing_over(plan):
            generation = Generation.open(store.fetch(name), verify=False)
            if (erasure := _of_generation(generation, ids, plan.datasets.values())) is not None:
                change = Change("generation", name, _counts(generation, ids, erasure))
                plan.generations[name] = erasure
                plan.vocabularies.add(erasure.new_hash)
                plan.found |= {i for i in ids if i in generation.user_ids}
                plan.changes.append(change)
            plan.vocabularies.add(str(generation.manifest["vocabulary_hash"]))
            plan.fingerprints.add(str(generation.manifest["dataset_fingerprint"]))
    for path, (manifest, has_users) in _opened(config.checkpoints, _checkpoint, plan):
        erasure = _matching(manifest["dataset_fingerprint"], manifest["vocabulary_hash"], plan.erasures)
        if erasure is not None:
            plan.checkpoints[path] = erasure
            plan.changes.append(Change(CHECKPOINT, path.name, {"users": erasure.num_users}))
        elif manifest["vocabulary_hash"] not in plan.vocabularies and has_users:
            plan.left.append(
                f"checkpoint {path} is of a vocabulary that no dataset and no generation here has, so that "
                "nobody can tell whose embeddings it holds; delete it if it was trained with the users"
            )
    for path, lists in _opened(config.recommendations, lambda path: Lists.of(path, ids), plan):
        if lists.found:
            plan.lists.append(lists)
            plan.found |= lists.found
            counts = {"users": len(lists.found), "rows": lists.num_rows}
            plan.changes.append(Change("recommendations", path.name, counts))
    plan.fingerprints |= {erasure.new_dataset for erasure in plan.erasures}
    for path, report in _opened(
        config.reports, lambda path: ReportedUsers.of(path, ids, plan.erasures), plan
    ):
        if report.found or report.erasure is not None:
            plan.reports.append(report)
            plan.found |= report.found
        if report.removed:
            plan.changes.append(Change("report", path.name, report.removed))
        if report.dataset is not None and report.dataset not in plan.fingerprints:
            plan.left.append(
                f"report {path} is of dataset {report.dataset}, which is not here, so that nobody can tell "
                "whose metrics its users.parquet holds; delete it if it was of the users"
            )
    return plan


def _dataset(path: Path, ids: Sequence[str]) -> tuple[Dataset, Forgetting | None]:
    dataset = Dataset.open(path)
    return dataset, Forgetting.of(dataset, ids)


def _checkpoint(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the manifest of a checkpoint, and whether it has rows that are of one user each."""
    return checkpoint_manifest(path), knows_users(path)


def _counts(generation: Generation, ids: Sequence[str], erasure: Erasure) -> dict[str, int]:
    rows = generation.user_ids.rows(ids, missing="negative")
    rows = np.unique(rows[rows >= 0])
    seen, history = np.diff(generation.seen_offsets)[rows], np.diff(generation.histories.offsets)[rows]
    counts = {"users": len(rows), "history_items": int(history.sum()), "seen_items": int(seen.sum())}
    blank = np.setdiff1d(blank_items(generation, erasure), generation.item_ids.forgotten)
    return {**counts, "item_ids": len(blank)}


def _of_generation(generation: Generation, ids: Sequence[str], datasets: Iterable[Erasure]) -> Erasure | None:
    own = erasure_of(generation, ids)
    if own is None:
        return None
    # Its dataset knows more, so that both come to the same towers.
    exact = [e for e in datasets if (e.old_dataset, e.old_hash) == (own.old_dataset, own.old_hash)]
    return exact[0] if exact else own


def _matching(dataset: str, vocabulary: str, erasures: Sequence[Erasure]) -> Erasure | None:
    """Return what has to go from something of a vocabulary, by its own dataset where that is there."""
    same = [e for e in erasures if e.old_hash == vocabulary]
    return next((e for e in same if e.old_dataset == dataset), same[0] if same else None)


def _forget_generations(store: Store, ids: Sequence[str], plan: _Plan) -> None:
    successors = Successors(store)
    for _ in range(_ROUNDS):
        made = {}
        for name in store.generations():
            erasure = None
            # What can not be read was noted when users were looked for.
            with _passing_over(_Plan()):
                generation = Generation.open(store.fetch(name), verify=False)
                erasure = _of_generation(generation, ids, plan.datasets.values())
            if erasure is not None:
                say(f"generation {name}: {erasure.num_users:,} users")
                # One that appeared meanwhile may be of another vocabulary.
                store.supersede({erasure.old_hash})
                made[name] = successors.write(generation, erasure)
        for name, successor in made.items():
            with contextlib.suppress(RefusedError):
                # Who was faster named another one, which the next round looks at.
                store.succeed(name, successor)
        removed = store.remove(made)
        plan.changes += [Change("leftover", name, {}) for name in removed.leftovers]
        if set(made) <= set(removed.generations):
            return
    raise RefusedError(
        f"other processes come between again and again in {store.where}; datasets still hold the users. Run "
        "it again when nobody else publishes"
    )


def _remove_leftovers(config: Config) -> list[str]:
    """Remove what killed runs left below the folders, and trainings that have not ended; returns paths."""
    gone = []
    for folder in _folders(config):
        for partial in sorted(folder.glob(".*.partial")):
            with lock_if_free(partial.with_name(f"{partial.name.removesuffix('.partial')}.lock")) as free:
                if free:
                    remove(partial)
                    gone.append(str(partial.relative_to(config.home)))
    # Their names follow from a dataset that is gone: nobody would go on with them.
    runs = config.checkpoints / ".runs"
    for run in sorted(p for p in runs.iterdir() if p.is_dir()) if runs.is_dir() else []:
        remove(run)
        gone.append(str(run.relative_to(config.home)))
    return gone

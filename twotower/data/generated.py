"""A catalogue and interactions drawn from planted tastes, whose true scores are known.

Every item belongs to one taste, and its popularity inside it follows Zipf's law. A user likes a few tastes
and a little of everything: ``p(i | u) = sum_c theta_uc phi_c(i)``. A user's items are drawn one after another
from p without those he already had, so the true scores of the items left rank them best at any moment.

Symbols: C tastes, N items, Q users, L tastes that one user likes most. Users are drawn in blocks, each with
random streams of its own, so that no user depends on how many are drawn before him or at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from twotower.config import GeneratedSource
from twotower.errors import ConfigError, DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

GENERATOR_VERSION = 1
"""Changes whenever the same source section draws other data."""

BLOCK_USERS = 1024
WINDOW_START = 1_704_067_200_000_000  # 2024-01-01 UTC, in microseconds
WINDOW_MICROS = 731 * 86_400_000_000  # two years
_LIKED_TASTES = 3
_EVERYTHING = 0.05  # share of a user's draws that come from the average taste
_FEWEST = 5
_SPREAD = 0.8  # of the log-normal number of interactions of a user
_MOST_OF_CATALOGUE = 0.25  # no user has a larger share of the catalogue
_ROUNDS = 8
_USER, _ITEM = "u", "i"


@dataclasses.dataclass(frozen=True)
class UserBlock:
    """Users ``first`` to ``first + B - 1`` of a source."""

    first: int
    liked: IntArray
    """[B, L] int64, the tastes each user likes."""
    share: FloatArray
    """[B, L] float64, how much of each, summing to 1."""
    wanted: IntArray
    """[B] int64, number of interactions to draw."""


class PlantedTastes:
    """The planted model of a source: which taste each item has, and what each user likes."""

    def __init__(self, source: GeneratedSource) -> None:
        """Draw the catalogue: O(N) time and memory.

        Raises:
            ConfigError: the sizes contradict each other.
        """
        self.source = source
        mean = source.num_interactions / source.num_users
        if mean < 2:
            raise ConfigError(
                f"data.source.num_interactions ({source.num_interactions:,}) must be at least 2 for "
                "each of the "
                f"{source.num_users:,} users; lower data.source.num_users"
            )
        self._most = max(2, int(_MOST_OF_CATALOGUE * source.num_items))
        if mean > self._most / 2:
            raise ConfigError(
                f"data.source.num_interactions ({source.num_interactions:,}) is {mean:.0f} for each "
                "user, too many of "
                f"{source.num_items:,} items; use at most {self._most // 2 * source.num_users:,} or "
                "raise num_items"
            )
        if source.num_tastes * 2 > source.num_items:
            raise ConfigError(
                f"data.source.num_tastes ({source.num_tastes}) must be at most half of num_items "
                f"({source.num_items})"
            )
        num_items, num_tastes = source.num_items, source.num_tastes
        rng = np.random.default_rng([source.seed, 0])
        order = rng.permutation(num_items)
        self.taste: IntArray = np.empty(num_items, dtype=np.int64)
        self.taste[order] = np.arange(num_items) % num_tastes
        rank = np.empty(num_items, dtype=np.int64)
        rank[order] = np.arange(num_items) // num_tastes
        weight = (rank + 1.0) ** -source.popularity_exponent
        total = np.bincount(self.taste, weights=weight, minlength=num_tastes)
        self.phi: FloatArray = weight / total[self.taste]
        """[N] probability of each item in its own taste."""
        prevalence = rng.gamma(8.0, size=num_tastes)
        self.prevalence: FloatArray = prevalence / prevalence.sum()
        """[C] how often each taste is liked."""
        # Items by taste, and for each the upper end of its interval in [taste, taste + 1): one binary search
        # draws an item of any taste.
        self._items = np.lexsort((rank, self.taste))
        sizes = np.bincount(self.taste, minlength=num_tastes)
        self._ends = np.cumsum(sizes) - 1
        inside = self.phi[self._items]
        before = np.concatenate([[0.0], np.cumsum(inside)])[self._ends + 1 - sizes]
        self._upper = np.cumsum(inside) - np.repeat(before, sizes) + np.repeat(np.arange(num_tastes), sizes)
        self._upper[self._ends] = np.arange(num_tastes) + 1.0
        self._log_mean = _log_mean(mean, min(_FEWEST, int(mean)), self._most)
        self._fewest = min(_FEWEST, int(mean))

    @property
    def num_blocks(self) -> int:
        """Blocks of users."""
        return -(-self.source.num_users // BLOCK_USERS)

    def block(self, number: int) -> UserBlock:
        """Return what the users of a block like, the same at every call."""
        first = number * BLOCK_USERS
        size = min(BLOCK_USERS, self.source.num_users - first)
        rng = np.random.default_rng([self.source.seed, 1, number])
        num_liked = min(_LIKED_TASTES, self.source.num_tastes)
        # The largest of log prevalence + Gumbel noise are tastes drawn without replacement.
        noise = rng.gumbel(size=(size, self.source.num_tastes)) + np.log(self.prevalence)
        liked = np.argpartition(-noise, num_liked - 1, axis=1)[:, :num_liked]
        liked = np.take_along_axis(
            liked, np.argsort(-np.take_along_axis(noise, liked, axis=1), axis=1), axis=1
        )
        how_many = rng.integers(1, num_liked + 1, size=size)
        share = rng.gamma(1.5, size=(size, num_liked)) * (np.arange(num_liked) < how_many[:, None])
        share /= share.sum(axis=1, keepdims=True)
        wanted = np.exp(self._log_mean + _SPREAD * rng.standard_normal(size))
        wanted = np.clip(np.round(wanted), self._fewest, self._most).astype(np.int64)
        return UserBlock(first, liked.astype(np.int64), share, wanted)

    def draw(self, number: int) -> tuple[IntArray, IntArray, IntArray]:
        """Return a block's interactions by user and time: user, item, time in us, each [n] int64."""
        block = self.block(number)
        rng = np.random.default_rng([self.source.seed, 2, number])
        size = len(block.wanted)
        bounds = np.cumsum(block.share, axis=1)[:, :-1]
        average = np.cumsum(self.prevalence)
        user = np.empty(0, dtype=np.int64)
        item = np.empty(0, dtype=np.int64)
        missing = block.wanted
        for _ in range(_ROUNDS):
            drawn = np.repeat(np.arange(size), missing + missing // 2 + (missing > 0))
            slot = (rng.random(len(drawn))[:, None] > bounds[drawn]).sum(axis=1)
            taste = block.liked[drawn, slot]
            anything = np.flatnonzero(rng.random(len(drawn)) < _EVERYTHING)
            taste[anything] = np.minimum(
                np.searchsorted(average, rng.random(len(anything))), self.source.num_tastes - 1
            )
            place = np.searchsorted(self._upper, taste + rng.random(len(drawn)), side="right")
            fresh = self._items[np.minimum(place, self._ends[taste])]
            user, item = _first_of_each(np.append(user, drawn), np.append(item, fresh), block.wanted)
            missing = block.wanted - np.bincount(user, minlength=size)
            if not missing.any():
                break
        return user + block.first, item, self._times(rng, user, size)

    def _times(self, rng: np.random.Generator, user: IntArray, size: int) -> IntArray:
        """Return increasing times inside each user's own part of the window."""
        start = rng.random(size) * 0.7
        length = (1 - start) * (0.3 + 0.7 * rng.random(size))
        gaps = np.cumsum(rng.standard_exponential(len(user)) + 1e-3)
        count = np.bincount(user, minlength=size)
        first = np.cumsum(count) - count
        last = np.maximum(first + count - 1, 0)
        before = np.where(first > 0, gaps[first - 1], 0.0)
        share = (gaps - before[user]) / (gaps[last] - before)[user]
        # Whole seconds, as in most logs; the place inside the user keeps them apart.
        seconds = ((start[user] + length[user] * share) * (WINDOW_MICROS // 1_000_000 * 0.98)).astype(
            np.int64
        )
        place = np.arange(len(user)) - first[user]
        times: IntArray = WINDOW_START + (seconds + place) * 1_000_000
        return times

    def log_scores(self, users: IntArray) -> npt.NDArray[np.float32]:
        """Return [Q, N] float32: log p(i | u) of every item for users given by number."""
        scores = np.empty((len(users), self.source.num_items), dtype=np.float32)
        log_phi = np.log(self.phi)
        for number in np.unique(users // BLOCK_USERS):
            block = self.block(int(number))
            at = np.flatnonzero(users // BLOCK_USERS == number)
            local = users[at] - block.first
            theta = np.tile(_EVERYTHING * self.prevalence, (len(at), 1))
            np.add.at(
                theta,
                (np.arange(len(at))[:, None], block.liked[local]),
                (1 - _EVERYTHING) * block.share[local],
            )
            scores[at] = np.log(theta)[:, self.taste] + log_phi
        return scores


def user_id(number: int) -> str:
    """Return the id of a generated user."""
    return f"{_USER}{number}"


def item_id(number: int) -> str:
    """Return the id of a generated item; its number is also its item row."""
    return f"{_ITEM}{number}"


def draw_all(tastes: PlantedTastes) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """Yield every block's interactions, in order."""
    for number in range(tastes.num_blocks):
        yield tastes.draw(number)


def true_scores(source: GeneratedSource, user_ids: list[str]) -> npt.NDArray[np.float32]:
    """Return [Q, N] float32: log p(item | user) in item row order, for generated users.

    Raises:
        DataError: an id is not one of the source's users.
    """
    numbers = np.empty(len(user_ids), dtype=np.int64)
    for at, text in enumerate(user_ids):
        digits = text.removeprefix(_USER)
        if not digits.isdecimal() or user_id(int(digits)) != text or int(digits) >= source.num_users:
            raise DataError(
                f"{text!r} is no generated user; they are {user_id(0)} to {user_id(source.num_users - 1)}"
            )
        numbers[at] = int(digits)
    return PlantedTastes(source).log_scores(numbers)


def _first_of_each(user: IntArray, item: IntArray, wanted: IntArray) -> tuple[IntArray, IntArray]:
    """Keep each user's first ``wanted`` different items in draw order, sorted by user."""
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    _, first = np.unique(user * (int(item.max(initial=0)) + 1) + item, return_index=True)
    first.sort()
    user, item = user[first], item[first]
    count = np.bincount(user, minlength=len(wanted))
    place = np.arange(len(user)) - (np.cumsum(count) - count)[user]
    keep = place < wanted[user]
    return user[keep], item[keep]


def _log_mean(mean: float, fewest: int, most: int) -> float:
    """Return mu so that exp(mu + spread z), clipped to [fewest, most], has the given mean."""
    z = np.random.default_rng(0).standard_normal(20_001)
    low, high = np.log(0.01), np.log(4.0 * most)
    for _ in range(60):
        middle = (low + high) / 2
        drawn = np.clip(np.round(np.exp(middle + _SPREAD * z)), fewest, most).mean()
        low, high = (middle, high) if drawn < mean else (low, middle)
    return float(low)

"""Training interactions in memory as examples, and the towers' inputs of them.

An example is a positive interaction of the fitted split with a catalogue item, and weighs in the loss what
the interaction weighs; one that weighs nothing is no example, and is in the history of others all the same.
Its query knows what the user did strictly before the interaction's time inside the fitted split
(``docs/knowledge.md``); where there are no times, the user's other interactions of that split.
``Examples`` holds all users, or those of a part of the stream.

Shapes: B rows of a batch, n examples, C candidates, H history length.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from twotower.data.dataset import Dataset
from twotower.data.histories import Histories, Order
from twotower.data.interactions import Interactions
from twotower.data.windows import Stretches, Windows
from twotower.errors import TrainingError
from twotower.model.batch import FeatureBatch
from twotower.model.features import Columns, QueryFeatures, encode_columns, item_batch, profile_values
from twotower.schema import SPLITS, SplitName
from twotower.training.checks import check_times
from twotower.training.explicit import ExplicitNegatives
from twotower.training.weights import Factors

Fit = Literal["train", "known", "all"]
"""The splits that are fitted: train, what a query of the test split knows (train and validation), or all."""
_LAST_SPLIT: dict[Fit, SplitName] = {"train": "train", "known": "validation", "all": "test"}
IntArray = npt.NDArray[np.int64]


class TowerInputs:
    """What both towers read of items and users: the static columns of the whole tables, by row."""

    def __init__(self, dataset: Dataset) -> None:
        """Encode the item and user tables.

        Raises:
            TrainingError: a feature reads times, and there are none.
        """
        self.schema = dataset.schema
        self.num_items = dataset.num_items
        self.num_catalogue_items = dataset.num_catalogue_items
        self.has_times = dataset.has_times
        self.order: Order = "none"
        if dataset.has_times:
            self.order = "rows" if dataset.ties == "order" else "times"
        check_times(dataset)
        self._item_columns = encode_columns(dataset.schema.item, dataset.item_table())
        self._user_columns = encode_columns(dataset.schema.query, dataset.user_table())
        self._queries = QueryFeatures(dataset.schema, profile_values(dataset.schema, self._item_columns))

    def items(self, item_rows: IntArray) -> FeatureBatch:
        """Return the item tower's input of catalogue items [B]; -1 is padding, fed as some item."""
        rows = np.maximum(item_rows, 0)
        return item_batch(self.schema, rows, {n: c[rows] for n, c in self._item_columns.items()})

    def queries(
        self,
        user_rows: IntArray,
        history_rows: IntArray,
        history_weights: npt.NDArray[np.float32],
        history_times: IntArray | None = None,
        stretches: Stretches | None = None,
    ) -> FeatureBatch:
        """Return the query tower's input of users [B] with histories [B, H]; -1 is padding.

        Sequence features read ``stretches`` instead, where they are given.
        """
        rows = np.maximum(user_rows, 0)
        columns: Columns = {n: c[rows] for n, c in self._user_columns.items()}
        return self._queries(user_rows, columns, history_rows, history_weights, history_times, stretches)


class Examples:
    """Examples of some users, each numbered by its place among them."""

    def __init__(
        self,
        inputs: TowerInputs,
        fitted: Interactions,
        user_rows: IntArray | None = None,
        with_explicit: bool = False,
        weighted: bool = True,
        factors: Factors | None = None,
    ) -> None:
        """Take the fitted interactions of some users.

        Args:
            inputs: of the dataset.
            fitted: all interactions of these users that may be trained on.
            user_rows: row in the user table of each user of ``fitted``; the same number when not given.
            with_explicit: keep their negative interactions too, for ``explicit_negatives``.
            weighted: look at the weights of interactions; otherwise every one is an example that weighs 1.
            factors: of the weights, beside those of interactions.
        """
        self.inputs = inputs
        self.histories = Histories.of(fitted)
        self._user_rows = user_rows
        self._user_of = np.repeat(
            np.arange(self.histories.num_users, dtype=np.int32), np.diff(self.histories.offsets)
        )
        self._weighted = weighted
        self._factors = factors
        is_example = self.histories.item_rows < inputs.num_catalogue_items
        if weighted:
            is_example &= self.histories.weights > 0
        self._examples = np.flatnonzero(is_example)
        self._user_counts = np.bincount(self._user_of[self._examples], minlength=self.histories.num_users)
        self._explicit = (
            ExplicitNegatives.of(fitted, inputs.num_catalogue_items, inputs.has_times)
            if with_explicit
            else None
        )
        self._wanted = np.zeros(inputs.num_items, bool)
        self._windows = None
        length = inputs.schema.sequence_length
        if length and inputs.order != "none":
            users = self._user_of[self._examples].astype(np.int64)
            self._windows = Windows.of(self.histories, self._examples, users, length, inputs.order)

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        inputs: TowerInputs,
        fit: Fit,
        with_explicit: bool = False,
        weighted: bool = True,
        factors: Factors | None = None,
    ) -> Examples:
        """Return all examples of a dataset's fitted split.

        Args:
            dataset: prepared.
            inputs: of that dataset.
            fit: the train split, or every interaction.
            with_explicit: keep negative interactions too.
            weighted: look at the weights of interactions.
            factors: of the weights, beside those of interactions.

        Raises:
            TrainingError: there is none.
        """
        examples = cls(inputs, fitted_part(dataset.interactions, fit), None, with_explicit, weighted, factors)
        if len(examples) == 0:
            raise no_examples(dataset, fit, weighted)
        return examples

    def __len__(self) -> int:
        """Return n, the number of examples."""
        return len(self._examples)

    def item_rows(self, examples: IntArray) -> IntArray:
        """Return the positive item of examples [B], -1 for padding."""
        items = self.histories.item_rows[self._positions(examples)].astype(np.int64)
        return np.where(examples < 0, -1, items)

    def user_rows(self, examples: IntArray) -> IntArray:
        """Return the user of examples [B], -1 for padding."""
        users = self._user_of[self._positions(examples)].astype(np.int64)
        if self._user_rows is not None:
            users = self._user_rows[users]
        return np.where(examples < 0, -1, users)

    def user_counts(self, examples: IntArray) -> IntArray:
        """Return how many examples the user of each of examples [B] has, 0 for padding."""
        counts = self._user_counts[self._user_of[self._positions(examples)]]
        return np.where(examples < 0, 0, counts)

    def weights(self, examples: IntArray) -> npt.NDArray[np.float64]:
        """Return what examples [B] weigh in the loss, float64, 0 for padding."""
        positions = self._positions(examples)
        weights = np.ones(len(examples))
        if self._weighted:
            weights = self.histories.weights[positions].astype(np.float64)
        if self._factors is not None:
            counts = self._user_counts[self._user_of[positions]]
            weights *= self._factors(self.histories.times[positions], counts)
        return np.where(examples < 0, 0.0, weights)

    def item_counts(self) -> IntArray:
        """Return how many examples each catalogue item has, [num_catalogue_items] int64."""
        rows = self.histories.item_rows[self._examples]
        return np.bincount(rows, minlength=self.inputs.num_catalogue_items)

    def queries(self, examples: IntArray) -> FeatureBatch:
        """Return the query tower's input for examples [B]; -1 is padding, an unknown user without history."""
        positions = self._positions(examples)
        users = self._user_of[positions].astype(np.int64)
        user_rows, schema = self.user_rows(examples), self.inputs.schema
        stretches, length = None, schema.max_history
        if self._windows is not None:
            stretches, length = self._windows.stretches(examples, user_rows), schema.max_pooled_history
        places = positions - self.histories.offsets[users]
        rows, weights = self.histories.of_examples(users, places, length, self.inputs.order)
        padding = examples < 0
        rows[padding], weights[padding] = -1, 0
        return self.inputs.queries(user_rows, rows, weights, None, stretches)

    def shuffled(self, random: np.random.Generator, among: IntArray | None = None) -> IntArray:
        """Return the numbers of examples in random order; those of one window stay together.

        Args:
            random: generator.
            among: numbers that are wanted, ascending; all where not given.
        """
        among = np.arange(len(self)) if among is None else among
        return random.permutation(among) if self._windows is None else self._windows.shuffled(random, among)

    def latest_queries(self, users: IntArray) -> FeatureBatch:
        """Return the query tower's input for users [B] of ``fitted`` after all of their interactions."""
        length = self.inputs.schema.max_history
        rows, weights = self.histories.before(users, None, length)
        times = self.histories.times_before(users, None, length) if self.inputs.schema.time_gaps else None
        in_table = users if self._user_rows is None else self._user_rows[users]
        return self.inputs.queries(in_table, rows, weights, times)

    def known_positives(self, examples: IntArray, among: IntArray | None = None) -> tuple[IntArray, IntArray]:
        """Return what the users of examples have in the fitted split, as compressed rows.

        Args:
            examples: [B] int64; padding has none.
            among: item rows that are asked for; all where not given.

        Returns:
            offsets [B + 1] int64 and item rows [m] int64.
        """
        # A user with many examples is in a batch many times, so the look-up is made once for each user.
        users, user_of = np.unique(self._user_of[self._positions(examples)], return_inverse=True)
        begin, end = self.histories.offsets[users], self.histories.offsets[users + 1]
        rows = self.histories.item_rows[_ranges(begin, end - begin)]
        lengths = end - begin
        if among is not None:
            self._wanted[among[among >= 0]] = True
            found = self._wanted[rows]
            self._wanted[among[among >= 0]] = False
            found_before = np.concatenate([[0], np.cumsum(found)])
            lengths = np.diff(found_before[np.concatenate([[0], np.cumsum(lengths)])])
            rows = rows[found]
        starts = np.cumsum(lengths) - lengths
        counts = np.where(examples < 0, 0, lengths[user_of])
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return offsets, rows[_ranges(starts[user_of], counts)].astype(np.int64)

    def explicit_negatives(self, examples: IntArray, count: int) -> IntArray:
        """Return the user's own latest negatives up to each example's time, [B, count] int64, -1 for none."""
        assert self._explicit is not None
        positions = self._positions(examples)
        times = self.histories.times[positions] if self.inputs.has_times else None
        rows = self._explicit.latest(self._user_of[positions].astype(np.int64), times, count)
        return np.where((examples < 0)[:, None], -1, rows)

    def _positions(self, examples: IntArray) -> IntArray:
        """Return positions among the histories; padding gets that of some example, and is masked later."""
        if len(self._examples) == 0:
            raise TrainingError("a batch was asked of an empty set of examples")
        return self._examples[np.maximum(examples, 0)]


def fitted_part(interactions: Interactions, fit: Fit) -> Interactions:
    """Return the interactions that may be trained on."""
    if fit == "all":
        return interactions
    return interactions.select(interactions.split <= last_split(fit))


def last_split(fit: Fit) -> int:
    """Return the last code of ``schema.SPLITS`` that is fitted, which are in the order of time."""
    return SPLITS[_LAST_SPLIT[fit]]


def no_examples(dataset: Dataset, fit: Fit, weighted: bool) -> TrainingError:
    """Return the error of a dataset without examples."""
    above, remedy = (" with a weight above 0", ", or set train.loss.weights: none") if weighted else ("", "")
    return TrainingError(
        f"dataset {dataset.path} has no positive interaction with a catalogue item in split {fit!r}{above}; "
        f"look at data.positives and at the ids of the item table{remedy}"
    )


def _ranges(begin: IntArray, lengths: IntArray) -> IntArray:
    """Return begin[0] .. begin[0] + lengths[0] - 1, then the same of the next one, and so on."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begin - (ends - lengths), lengths)

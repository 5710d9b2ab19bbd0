"""A streamed epoch has every example of one in memory once, with all of its user, and holds few rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from tests.sequences import TRANSFORMER
from tests.streams import HEAVY_USER, keys, keys_of, uneven_dataset, with_train
from twotower.config import Config
from twotower.data.blocks import Block, BlockIndex, read_blocks
from twotower.data.dataset import Dataset
from twotower.data.interactions import Interactions
from twotower.data.knowledge import Rules
from twotower.errors import TrainingError
from twotower.model.batch import Bag, FeatureBatch, Sequences
from twotower.schema import SPLITS
from twotower.training.collectives import World
from twotower.training.examples import Examples, Fit, TowerInputs
from twotower.training.loop import Trainer
from twotower.training.stream import StreamSource
from twotower.training.validation import validation_queries

BATCH = 24


@pytest.fixture(scope="module", params=["pooled", "transformer"])
def uneven(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Dataset]:
    history = TRANSFORMER if request.param == "transformer" else None
    config, dataset = uneven_dataset(tmp_path_factory.mktemp("uneven"), history)
    return with_train(config, global_batch_size=BATCH, num_workers=1, negatives={"explicit": 3}), dataset


def source_of(
    uneven: tuple[Config, Dataset],
    buffer: int,
    world: World | None = None,
    fit: str = "train",
    **train: object,
) -> StreamSource:
    config, dataset = uneven
    config = with_train(config, stream_buffer_rows=buffer, **train)
    read = partial(read_blocks, dataset.path / "interactions.parquet")
    return StreamSource(dataset, TowerInputs(dataset), config, world or World(), fit, read)


def in_memory(dataset: Dataset, fit: Fit = "train") -> Examples:
    return Examples.of(dataset, TowerInputs(dataset), fit, with_explicit=True)


def same_features(one: FeatureBatch, other: FeatureBatch) -> bool:
    assert one.keys() == other.keys()
    for name, value in one.items():
        theirs = other[name]
        if isinstance(value, Sequences):
            assert isinstance(theirs, Sequences)
            parts = ("stretch", "position", "read")
            if not all(getattr(value, part).equal(getattr(theirs, part)) for part in parts):
                return False
            if not (np.array_equal(value.names, theirs.names) and value.items.ids.equal(theirs.items.ids)):
                return False
        elif isinstance(value, Bag):
            assert isinstance(theirs, Bag)
            if not (value.ids.equal(theirs.ids) and value.weights.equal(theirs.weights)):
                return False
        elif not value.equal(theirs):
            return False
    return True


@pytest.mark.parametrize("block_rows", [1, 10, 100, 10_000])
def test_blocks_are_the_file_in_order_and_part_no_user(
    uneven: tuple[Config, Dataset], block_rows: int
) -> None:
    dataset = uneven[1]
    everything = dataset.interactions
    index = BlockIndex.scan(
        dataset.path / "interactions.parquet", block_rows, dataset.num_catalogue_items, SPLITS["train"]
    )
    assert [b.start for b in index.blocks] == [0, *(b.end for b in index.blocks[:-1])]
    assert index.blocks[-1].end == len(everything)
    examples = in_memory(dataset)
    assert (index.item_counts == examples.item_counts()).all()
    owners = examples.user_rows(np.arange(len(examples)))
    seen: set[int] = set()
    for block, read in zip(
        index.blocks, read_blocks(dataset.path / "interactions.parquet", index.blocks), strict=True
    ):
        part = slice(block.start, block.end)
        for name, column in read.columns().items():
            assert (column == getattr(everything, name)[part]).all()
        users = set(read.user_row.tolist())
        assert not users & seen
        assert len(block) <= block_rows or len(users) == 1
        assert block.num_examples == np.isin(owners, list(users)).sum()
        seen |= users
    assert HEAVY_USER in seen


@pytest.mark.parametrize("size", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("buffer", [1, 90, 400, 100_000])
@pytest.mark.parametrize("fit", ["train", "known", "all"])
def test_every_example_is_in_an_epoch_once(
    uneven: tuple[Config, Dataset], size: int, buffer: int, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks one after the other; that they exchange what they hold is tested with real processes."""
    monkeypatch.setattr("twotower.training.stream.dist.new_group", lambda backend: None)
    examples = in_memory(uneven[1], fit)
    everyone = np.sort(keys(examples, np.arange(len(examples))))
    found, lengths = [], set()
    for rank in range(size):
        source = source_of(uneven, buffer, World(rank, size), fit)
        shares = list(source.shares(1))
        assert len(shares) == source.steps_per_epoch == -(-len(examples) // BATCH)
        assert all((share.rows >= 0).all() and len(share.rows) == BATCH // size for share in shares[:-1])
        lengths.add(len(shares[-1].rows))
        assert (shares[-1].rows < 0).sum() <= 1
        found += keys_of(shares)
    assert len(lengths) == 1
    assert (np.sort(np.concatenate(found)) == everyone).all()
    assert source.rows_per_epoch == len(everyone) > 300
    # With the largest buffer 24 ranks are more than blocks.
    assert (len(source.index.blocks) < 24) == (buffer == 100_000)


def test_an_epoch_that_ends_evenly_on_one_rank_alone_is_padded(
    uneven: tuple[Config, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.training.stream.dist.new_group", lambda backend: None)
    total = len(in_memory(uneven[1]))
    size = 2
    batch = next(b for b in range(4, total, 2) if total % b == 1)
    last = []
    for rank in range(size):
        shares = list(
            source_of(uneven, 90, World(rank, size), global_batch_size=batch).shares(0, total // batch)
        )
        assert len(shares) == 1
        last.append(shares[0].rows)
    assert [len(rows) for rows in last] == [1, 1]
    assert sorted(rows[0] >= 0 for rows in last) == [False, True]


@pytest.mark.parametrize("buffer", [90, 400])
def test_a_streamed_example_knows_what_it_knows_in_memory(
    uneven: tuple[Config, Dataset], buffer: int
) -> None:
    memory = in_memory(uneven[1])
    numbers = {int(key): n for n, key in enumerate(keys(memory, np.arange(len(memory))))}
    with_history = with_negatives = 0
    for share in source_of(uneven, buffer).shares(0):
        mine = share.rows[share.rows >= 0]
        theirs = np.array([numbers[int(key)] for key in keys(share.examples, mine)])
        assert (share.item_rows[0][: len(mine)] == memory.item_rows(theirs)).all()
        assert (share.user_rows[0][: len(mine)] == memory.user_rows(theirs)).all()
        assert (share.user_counts[0][: len(mine)] == memory.user_counts(theirs)).all()
        assert (share.weights[0][: len(mine)] == memory.weights(theirs)).all()
        queries = share.examples.queries(mine)
        assert same_features(queries, memory.queries(theirs))
        history = queries["history"]
        if isinstance(history, Sequences):
            with_history += int((history.read >= 0).sum())
        else:
            assert isinstance(history, Bag)
            with_history += int((history.weights > 0).any(1).sum())
        for found, expected in zip(
            share.examples.known_positives(mine), memory.known_positives(theirs), strict=True
        ):
            assert found.tolist() == expected.tolist()
        negatives = share.examples.explicit_negatives(mine, 3)
        assert (negatives == memory.explicit_negatives(theirs, 3)).all()
        with_negatives += int((negatives >= 0).any(1).sum())
    assert with_history > len(memory) // 2
    assert with_negatives > len(memory) // 4


def test_the_order_follows_from_seed_and_epoch(uneven: tuple[Config, Dataset]) -> None:
    def order(epoch: int, seed: int) -> list[int]:
        config = uneven[0].model_copy(update={"seed": seed})
        return np.concatenate(keys_of(source_of((config, uneven[1]), 400).shares(epoch))).tolist()

    first = order(0, 1)
    assert order(0, 1) == first
    assert order(1, 1) != first
    assert order(0, 2) != first
    users = np.array(first) >> 32
    users = users[users != HEAVY_USER]
    # Neighbours in the file do not stay neighbours: a pool's users are mixed.
    if uneven[1].schema.sequence_length:
        users = users[np.flatnonzero(users[1:] != users[:-1])]  # windows stay together
        assert len(users) > 60
    assert (np.abs(users[1:] - users[:-1]) > 1).mean() > 0.6


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 3)])
@pytest.mark.parametrize("buffer", [1, 90, 400])
def test_a_restart_yields_what_remains_and_reads_no_finished_pool(
    uneven: tuple[Config, Dataset], rank: int, size: int, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.training.stream.dist.new_group", lambda backend: None)
    source = source_of(uneven, buffer, World(rank, size))
    whole = [k.tolist() for k in keys_of(source.shares(2))]
    num_blocks = sum(map(len, source.pools(2)))
    assert len(source.pools(2)) > 1
    asked: list[int] = []
    plain = source._read_blocks

    def spied(blocks: list[Block]) -> Iterator[Interactions]:
        asked.append(len(blocks))
        return plain(blocks)

    monkeypatch.setattr(source, "_read_blocks", spied)
    for step in range(len(whole)):
        assert [k.tolist() for k in keys_of(source.shares(2, step))] == whole[step:], step
    assert asked[0] == num_blocks
    assert sorted(asked, reverse=True) == asked
    assert asked[-1] <= len(source.pools(2)[-1]) + len(source.pools(2)[-2])


@pytest.mark.parametrize("buffer", [90, 400])
def test_no_more_rows_are_held_than_the_buffer_and_a_block(
    uneven: tuple[Config, Dataset], buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(uneven, buffer, global_batch_size=8)
    blocks_read = 0
    held: list[int] = []
    plain = source._read_blocks

    def counted(blocks: list[Block]) -> Iterator[Interactions]:
        nonlocal blocks_read
        for interactions in plain(blocks):
            blocks_read += 1
            yield interactions

    class Counted(Examples):
        def __init__(self, inputs: TowerInputs, fitted: Interactions, *rest: object) -> None:
            held.append(len(fitted))
            super().__init__(inputs, fitted, *rest)

    monkeypatch.setattr(source, "_read_blocks", counted)
    monkeypatch.setattr("twotower.training.stream.Examples", Counted)
    pools = source.pools(0)
    largest = max(len(block) for block in source.index.blocks)
    assert all(sum(len(p.block) for p in pool) <= buffer // 2 or len(pool) == 1 for pool in pools)
    allowed = np.cumsum([len(pool) for pool in pools])
    for _ in source.shares(0):
        assert blocks_read <= allowed[len(held) - 1], "blocks were read before they were needed"
    assert len(held) == len(pools) > 1
    assert max(held) <= buffer + largest
    assert blocks_read == allowed[-1]


@pytest.mark.parametrize("max_users", [1000, 6])
def test_validation_sees_the_same_users_streamed(uneven: tuple[Config, Dataset], max_users: int) -> None:
    dataset = uneven[1]
    inputs = TowerInputs(dataset)
    rules = Rules.of(dataset, "exclude")
    memory = validation_queries(lambda: [dataset.interactions], inputs, rules, max_users, 5)
    source = source_of(uneven, 90)
    streamed = validation_queries(source.blocks, inputs, rules, max_users, 5)
    assert len(list(source.blocks())) > 3
    for name in ("user_rows", "masked_offsets", "masked_rows", "relevant_offsets", "relevant_rows"):
        assert getattr(streamed.queries, name).tolist() == getattr(memory.queries, name).tolist(), name
    users = np.arange(len(memory.queries))
    assert len(users) == min(max_users, len(users)) > 5
    assert same_features(streamed.known.latest_queries(users), memory.known.latest_queries(users))


def test_a_streamed_training_learns_like_one_in_memory(small_config: Config, small_dataset: Dataset) -> None:
    config = with_train(small_config, stream_buffer_rows=2_000, epochs=3)
    read = partial(read_blocks, small_dataset.path / "interactions.parquet")

    def streamed(inputs: TowerInputs) -> StreamSource:
        return StreamSource(small_dataset, inputs, config, World(), "train", read)

    histories = []
    for make_source in (None, streamed):
        trainer = Trainer(config, small_dataset, World(), "train", make_source)
        for _ in range(config.train.epochs):
            trainer.run_epoch()
        histories.append(trainer.history)
    memory, stream = histories
    assert memory[-1].loss < memory[0].loss - 0.1
    assert stream[-1].loss == pytest.approx(memory[-1].loss, abs=0.05)
    assert stream[-1].loss != memory[-1].loss
    assert stream[-1].validation_recall == pytest.approx(memory[-1].validation_recall, abs=0.05)


def test_what_can_not_be_streamed_is_refused(uneven: tuple[Config, Dataset]) -> None:
    with pytest.raises(TrainingError, match=r"mined.per_query \(2\) needs all examples in memory"):
        source_of(uneven, 90, negatives={"mined": {"per_query": 2}})
    config, dataset = uneven
    inputs = TowerInputs(dataset)
    inputs.num_catalogue_items = 0
    with pytest.raises(TrainingError, match="no positive interaction with a catalogue item in split 'train'"):
        StreamSource(dataset, inputs, config, World(), "train", lambda blocks: iter(()))


def test_the_order_key_names_the_workers(
    uneven: tuple[Config, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.training.stream.dist.new_group", lambda backend: None)
    assert source_of(uneven, 90, World(0, 2)).order_key == source_of(uneven, 90, World(1, 2)).order_key
    assert source_of(uneven, 90, World(0, 3)).order_key != source_of(uneven, 90, World(0, 2)).order_key
